// Streams and events: in which order operations run, and who waits for them.
#include "state.h"

namespace emulator {

Stream* stream_of(void* handle) {
    Context* context = current_context();
    if (context == nullptr) return nullptr;
    if (handle == nullptr || handle == reinterpret_cast<void*>(1)) return &context->legacy;
    if (handle == reinterpret_cast<void*>(2)) return &context->per_thread;
    auto* stream = static_cast<Stream*>(handle);
    return state().streams.count(stream) ? stream : nullptr;
}

Status enqueue(Stream* stream, const std::shared_ptr<Operation>& operation, bool programmatic) {
    Context* context = stream->context;
    if (context->gpu.error != 0) return static_cast<Status>(context->gpu.error);
    operation->device = &context->gpu;
    if (stream->capture != nullptr) {
        if (stream->capture->invalid) return kCaptureInvalidated;
        Node node{operation, {}};
        for (size_t tip : stream->tips) node.after.push_back({tip, programmatic && stream->tips.size() == 1});
        stream->capture->graph->nodes.push_back(std::move(node));
        stream->tips = {stream->capture->graph->nodes.size() - 1};
        return kOk;
    }
    const auto wait = [&](const std::shared_ptr<Operation>& on, bool early) {
        if (on != nullptr && !on->done) operation->waits.push_back({on, early});
    };
    wait(stream->last, programmatic && stream->last != nullptr && stream->last->kind == Operation::launch);
    if (stream == &context->legacy) {
        for (Stream* other : context->streams) {
            if (other->non_blocking) continue;
            if (other->capture != nullptr) {
                other->capture->invalid = true;
                return kCaptureImplicit;
            }
            wait(other->last, false);
        }
        wait(context->per_thread.last, false);
    } else if (!stream->non_blocking) {
        wait(context->legacy.last, false);
    }
    stream->last = operation;
    submit(operation);
    return kOk;
}

void wait_for(const std::shared_ptr<Operation>& operation) {
    if (operation != nullptr) wait_until([&] { return operation->done; });
}

static std::vector<std::shared_ptr<Operation>> all_last(Context* context) {
    std::vector<std::shared_ptr<Operation>> all{context->legacy.last, context->per_thread.last};
    for (Stream* stream : context->streams) all.push_back(stream->last);
    for (const auto& last : context->orphans) all.push_back(last);
    return all;
}

void wait_for_all(Context* context) {
    for (const auto& last : all_last(context)) wait_for(last);
    context->orphans.clear();
}

void strict_wait() {
    static const bool is_strict = setting("EMULATOR_STRICT", 0) != 0;
    if (!is_strict) return;
    for (const auto& device : state().devices) wait_for_all(device.context);
}

Status run_async(void* stream_handle, std::shared_ptr<Operation> operation) {
    Lock lock;
    Stream* stream = stream_of(stream_handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    return enqueue(stream, operation, false);
}

}  // namespace emulator

using namespace emulator;

API cuStreamCreate(Stream** to, unsigned flags) {
    Lock lock;
    if (const Status status = check_change()) return status;
    if (flags > 1) return kInvalidValue;
    Context* context = current_context();
    *to = new Stream{context, flags == 1, nullptr, nullptr, {}};
    context->streams.insert(*to);
    return state().streams.insert(*to), kOk;
}
API cuStreamCreateWithPriority(Stream** to, unsigned flags, int) { return cuStreamCreate(to, flags); }
API cuStreamDestroy_v2(Stream* stream) {
    Lock lock;
    if (state().streams.erase(stream) == 0) return kInvalidHandle;
    if (stream->last != nullptr && !stream->last->done) stream->context->orphans.push_back(stream->last);
    if (stream->capture != nullptr) stream->capture->invalid = true;
    stream->context->streams.erase(stream);
    return delete stream, kOk;
}
API cuStreamSynchronize(void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return current_context() == nullptr ? kInvalidContext : kInvalidHandle;
    if (stream->capture != nullptr) return stream->capture->invalid = true, kCaptureUnsupported;
    Context* context = stream->context;
    // The legacy stream comes after all that blocks it.
    if (stream == &context->legacy) {
        if (const Status status = enqueue(stream, std::make_shared<Operation>(), false)) return status;
    }
    const auto last = stream->last;
    wait_for(last);
    return static_cast<Status>(context->gpu.error);
}
API cuStreamQuery(void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return stream->capture->invalid = true, kCaptureUnsupported;
    if (stream->context->gpu.error != 0) return static_cast<Status>(stream->context->gpu.error);
    return stream->last == nullptr || stream->last->done ? kOk : kNotReady;
}
API cuStreamGetCtx(void* handle, Context** context) {
    Lock lock;
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : (*context = stream->context, kOk);
}
API cuStreamGetFlags(void* handle, unsigned* flags) {
    Lock lock;
    Stream* stream = stream_of(handle);
    return stream == nullptr ? kInvalidHandle : (*flags = stream->non_blocking, kOk);
}
API cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    if (event->capture != nullptr) return join_capture(stream, event);
    if (stream->capture != nullptr) return kCaptureIsolation;
    auto operation = std::make_shared<Operation>();
    if (event->operation != nullptr && !event->operation->done) operation->waits.push_back({event->operation, false});
    return enqueue(stream, operation, false);
}
API cuLaunchHostFunc(void* handle, void (*call)(void*), void* data) {
    auto operation = std::make_shared<Operation>();
    operation->kind = Operation::host;
    operation->call = [call, data] { call(data); };
    return run_async(handle, operation);
}
API cuEventCreate(Event** event, unsigned) {
    Lock lock;
    Context* context = current_context();
    if (context == nullptr) return kInvalidContext;
    return *event = new Event{context, nullptr, nullptr, {}}, kOk;
}
API cuEventDestroy_v2(Event* event) {
    Lock lock;
    return delete event, kOk;
}
API cuEventRecord(Event* event, void* handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream == nullptr || event == nullptr) return kInvalidHandle;
    event->capture = stream->capture;
    event->tips = stream->tips;
    if (stream->capture != nullptr) return stream->capture->invalid ? kCaptureInvalidated : kOk;
    event->operation = std::make_shared<Operation>();
    return enqueue(stream, event->operation, false);
}
API cuEventQuery(Event* event) {
    Lock lock;
    if (event->context->gpu.error != 0) return static_cast<Status>(event->context->gpu.error);
    return event->operation == nullptr || event->operation->done ? kOk : kNotReady;
}
API cuEventSynchronize(Event* event) {
    Lock lock;
    Context* context = event->context;
    wait_for(std::shared_ptr(event->operation));
    return static_cast<Status>(context->gpu.error);
}
API cuEventElapsedTime(float* ms, Event* begin, Event* end) {
    Lock lock;
    if (begin->operation == nullptr || end->operation == nullptr) return kInvalidHandle;
    if (!begin->operation->done || !end->operation->done) return kNotReady;
    return *ms = static_cast<float>((end->operation->end_time - begin->operation->end_time) * 1e3), kOk;
}
API cuEventElapsedTime_v2(float* ms, Event* begin, Event* end) { return cuEventElapsedTime(ms, begin, end); }
