// What the driver API keeps: contexts, memory, streams, events, graphs. All guarded by the engine's lock.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "engine.h"

namespace emulator {

using Status = unsigned;
enum : Status {
    kOk = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNoDevice = 100,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kPeerUnsupported = 217,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kPeerAlreadyEnabled = 704,
    kPeerNotEnabled = 705,
    kCooperativeTooLarge = 720,
    kNotSupported = 801,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
    kCaptureUnjoined = 904,
    kCaptureIsolation = 905,
    kCaptureImplicit = 906,
    kCaptureWrongThread = 908,
};

struct Context;
struct Stream;

// Device memory lies in a file without a name, so that other processes can map it, between pages nobody may touch.
struct Allocation {
    char* region;
    size_t region_bytes;
    char* base;
    size_t bytes;
    enum Type { device, host, registered, imported } type;
    int ordinal;
    int file;
    uint64_t id;
    // imported
    std::string handle;
    int opened;
};

struct Node {
    std::shared_ptr<Operation> pattern;
    std::vector<std::pair<size_t, bool>> after;  // node, programmatic
};

struct Graph {
    std::vector<Node> nodes;
};

struct GraphExec {
    Graph graph;
    std::shared_ptr<Operation> last;
};

// A capture under way; streams that wait for an event in it join it.
struct Capture {
    Graph* graph;
    Stream* origin;
    int mode;  // 0 global, 1 thread-local, 2 relaxed
    uint64_t thread, id;
    bool invalid;
};

struct Stream {
    Context* context;
    bool non_blocking;
    std::shared_ptr<Operation> last;
    std::shared_ptr<Capture> capture;
    std::vector<size_t> tips;  // the nodes that the next one comes after
};

struct Event {
    Context* context;
    std::shared_ptr<Operation> operation;
    std::shared_ptr<Capture> capture;
    std::vector<size_t> tips;
};

struct Context {
    Device gpu;
    int retained = 0;
    Stream legacy, per_thread;
    std::set<Stream*> streams;
    std::set<int> peers;
    std::vector<std::shared_ptr<Operation>> orphans;  // the last of streams that were destroyed
    size_t used = 0;
};

struct Function {
    const Kernel* kernel;
    int dynamic_limit;
};

}  // namespace emulator
