// Captures and graphs.
#include <algorithm>

#include "state.h"

namespace emulator {

Status join_capture(Stream* stream, Event* event) {
    if (stream->capture == nullptr) {
        stream->capture = event->capture;
        stream->tips.clear();
    } else if (stream->capture != event->capture) {
        return kCaptureIsolation;
    }
    for (size_t tip : event->tips) {
        if (std::find(stream->tips.begin(), stream->tips.end(), tip) == stream->tips.end()) stream->tips.push_back(tip);
    }
    return kOk;
}

}  // namespace emulator

using namespace emulator;

API cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), kOk; }
API cuStreamBeginCapture_v2(void* handle, int mode) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream == &stream->context->legacy || stream->capture != nullptr) return kCaptureUnsupported;
    stream->capture = std::make_shared<Capture>(Capture{new Graph, stream, mode, thread_id(), ++state().next_id, false});
    stream->tips.clear();
    return state().captures.insert(stream->capture), kOk;
}
API cuStreamEndCapture(void* handle, Graph** graph) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    const auto capture = stream->capture;
    *graph = nullptr;
    if (capture == nullptr || capture->origin != stream) return 902;
    if (capture->mode != 2 && capture->thread != thread_id()) return kCaptureWrongThread;
    state().captures.erase(capture);
    // Whatever a joined stream left must come before the end of the origin.
    std::vector<bool> covered(capture->graph->nodes.size());
    for (size_t tip : stream->tips) covered[tip] = true;
    for (size_t i = covered.size(); i-- > 0;) {
        if (!covered[i]) continue;
        for (const auto& [before, early] : capture->graph->nodes[i].after) covered[before] = true;
    }
    const bool joined = std::all_of(covered.begin(), covered.end(), [](bool x) { return x; });
    for (Stream* other : state().streams) {
        if (other->capture == capture) other->capture = nullptr, other->tips.clear();
    }
    stream->context->per_thread.capture = nullptr;
    if (capture->invalid || !joined) {
        delete capture->graph;
        return capture->invalid ? kCaptureInvalidated : kCaptureUnjoined;
    }
    return *graph = capture->graph, kOk;
}
API cuStreamIsCapturing(void* handle, unsigned* status) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    *status = 0;
    if (stream == &stream->context->legacy) {
        for (Stream* other : stream->context->streams) {
            if (!other->non_blocking && other->capture != nullptr && other->capture->mode == 0) return kCaptureImplicit;
        }
    }
    return *status = stream->capture == nullptr ? 0 : stream->capture->invalid ? 2 : 1, kOk;
}
API cuStreamGetCaptureInfo_v2(void* handle, unsigned* status, uint64_t* id, Graph** graph, void***, size_t*) {
    if (const Status result = cuStreamIsCapturing(handle, status)) return result;
    Lock lock;
    Stream* stream = stream_of(handle);
    if (id != nullptr) *id = stream->capture == nullptr ? 0 : stream->capture->id;
    if (graph != nullptr) *graph = stream->capture == nullptr ? nullptr : stream->capture->graph;
    return kOk;
}
API cuGraphInstantiateWithFlags(GraphExec** exec, Graph* graph, unsigned long long) {
    Lock lock;
    return graph == nullptr ? kInvalidValue : (*exec = new GraphExec{*graph, nullptr}, kOk);
}
API cuGraphGetNodes(Graph* graph, void**, size_t* count) {
    Lock lock;
    return *count = graph->nodes.size(), kOk;
}
API cuGraphLaunch(GraphExec* exec, void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || exec == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return kNotSupported;
    // One mark before all, one after all; the same graph never overlaps itself.
    auto begin = std::make_shared<Operation>(), end = std::make_shared<Operation>();
    if (exec->last != nullptr && !exec->last->done) begin->waits.push_back({exec->last, false});
    if (const Status status = enqueue(stream, begin, false)) return status;
    std::vector<std::shared_ptr<Operation>> operations;
    for (const Node& node : exec->graph.nodes) {
        auto operation = std::make_shared<Operation>(*node.pattern);
        if (node.after.empty()) operation->waits.push_back({begin, false});
        for (const auto& [before, early] : node.after) {
            operation->waits.push_back({operations[before], early && operations[before]->kind == Operation::launch});
        }
        end->waits.push_back({operation, false});
        operations.push_back(operation);
        submit(operation);
    }
    exec->last = end;
    return enqueue(stream, end, false);
}
API cuGraphExecDestroy(GraphExec* exec) {
    Lock lock;
    return delete exec, kOk;
}
API cuGraphDestroy(Graph* graph) {
    Lock lock;
    return delete graph, kOk;
}
