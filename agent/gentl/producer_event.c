/* The one event there is: a buffer was filled. */
#include "producer.h"

#include <string.h>

GC_API GCRegisterEvent(GENTL_HANDLE source, int32_t event_type, GENTL_HANDLE *result) {
    ModuleKind kind;
    if (module_kind(source, &kind) != GC_ERR_SUCCESS) return last_error();
    if (!result) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    if (kind != MODULE_STREAM || event_type != EVENT_NEW_BUFFER)
        return fail(GC_ERR_NOT_IMPLEMENTED, "event %d: only a data stream has one, new buffer (1)", event_type);
    Stream *stream = source;
    if (stream->event) return fail(GC_ERR_RESOURCE_IN_USE, "the event is registered already");
    NewBufferEvent *event = g_new0(NewBufferEvent, 1);
    event->stream = stream;
    module_begin(&event->module, MODULE_EVENT);
    stream->event = event;
    *result = event;
    return GC_ERR_SUCCESS;
}

/* Whoever waits is sent away first. */
GC_API GCUnregisterEvent(GENTL_HANDLE source, int32_t event_type) {
    ModuleKind kind;
    if (module_kind(source, &kind) != GC_ERR_SUCCESS) return last_error();
    if (kind != MODULE_STREAM || event_type != EVENT_NEW_BUFFER)
        return fail(GC_ERR_NOT_IMPLEMENTED, "event %d: only a data stream has one, new buffer (1)", event_type);
    Stream *stream = source;
    NewBufferEvent *event = stream->event;
    if (!event) return fail(GC_ERR_NOT_INITIALIZED, "the event is not registered");
    module_end(&event->module);
    g_mutex_lock(&stream->mutex);
    event->kills = G_MAXUINT;
    g_cond_broadcast(&stream->changed);
    while (event->waiting > 0) g_cond_wait(&stream->changed, &stream->mutex);
    stream->event = NULL;
    g_mutex_unlock(&stream->mutex);
    g_free(event);
    return GC_ERR_SUCCESS;
}

/* Wait until a buffer is filled, the wait is killed, or its time is over. With the mutex held. */
static Buffer *wait_for_buffer(NewBufferEvent *event, guint64 timeout_ms) {
    Stream *stream = event->stream;
    gboolean for_ever = timeout_ms >= G_MAXINT32;
    gint64 end_us = g_get_monotonic_time() + (for_ever ? 0 : (gint64)timeout_ms * 1000);
    while (event->kills == 0 && g_queue_is_empty(&stream->filled)) {
        if (for_ever)
            g_cond_wait(&stream->changed, &stream->mutex);
        else if (!g_cond_wait_until(&stream->changed, &stream->mutex, end_us))
            break;
    }
    return event->kills == 0 ? g_queue_pop_head(&stream->filled) : NULL;
}

GC_API EventGetData(GENTL_HANDLE handle, void *out, size_t *size, uint64_t timeout_ms) {
    NewBufferEvent *event = module_of(handle, MODULE_EVENT);
    if (!event) return last_error();
    if (!out || !size) return fail(GC_ERR_INVALID_PARAMETER, "the place for the data or its size is NULL");
    EVENT_NEW_BUFFER_DATA data;
    if (*size < sizeof data)
        return fail(GC_ERR_BUFFER_TOO_SMALL, "%zu bytes given, %zu are needed", *size, sizeof data);
    Stream *stream = event->stream;
    g_mutex_lock(&stream->mutex);
    event->waiting++;
    Buffer *buffer = wait_for_buffer(event, timeout_ms);
    gboolean killed = event->kills > 0;
    if (killed && event->kills != G_MAXUINT) event->kills--;
    if (buffer) {
        buffer->state = BUFFER_IDLE;
        stream->delivered++;
        event->fired++;
        data = (EVENT_NEW_BUFFER_DATA){buffer, buffer->user};
    }
    event->waiting--;
    if (killed) g_cond_broadcast(&stream->changed);
    g_mutex_unlock(&stream->mutex);
    if (killed) return fail(GC_ERR_ABORT, "the wait was ended by EventKill");
    if (!buffer) return fail(GC_ERR_TIMEOUT, "no buffer was filled within %" G_GUINT64_FORMAT " ms", timeout_ms);
    memcpy(out, &data, sizeof data);
    *size = sizeof data;
    return GC_ERR_SUCCESS;
}

GC_API EventGetDataInfo(GENTL_HANDLE handle, const void *in, size_t in_size, int32_t command, INFO_DATATYPE *type,
                        void *out, size_t *size) {
    if (!module_of(handle, MODULE_EVENT)) return last_error();
    EVENT_NEW_BUFFER_DATA data;
    if (!in || in_size < sizeof data) return fail(GC_ERR_INVALID_PARAMETER, "this is not the data of a new buffer");
    memcpy(&data, in, sizeof data);
    switch (command) {
        case EVENT_DATA_ID: return answer_pointer(data.BufferHandle, type, out, size);
        case EVENT_DATA_VALUE: return answer_pointer(data.pUserPointer, type, out, size);
        default: return not_available("the event", command);
    }
}

GC_API EventGetInfo(GENTL_HANDLE handle, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    NewBufferEvent *event = module_of(handle, MODULE_EVENT);
    if (!event) return last_error();
    g_mutex_lock(&event->stream->mutex);
    gsize waiting = g_queue_get_length(&event->stream->filled);
    guint64 fired = event->fired;
    g_mutex_unlock(&event->stream->mutex);
    switch (command) {
        case EVENT_EVENT_TYPE: return answer_int32(EVENT_NEW_BUFFER, type, out, size);
        case EVENT_NUM_IN_QUEUE: return answer_size(waiting, type, out, size);
        case EVENT_NUM_FIRED: return answer_uint64(fired, type, out, size);
        case EVENT_SIZE_MAX:
        case EVENT_INFO_DATA_SIZE_MAX: return answer_size(sizeof(EVENT_NEW_BUFFER_DATA), type, out, size);
        default: return not_available("the event", command);
    }
}

/* The filled buffers are no longer told of; they are the client's again. */
GC_API EventFlush(GENTL_HANDLE handle) {
    NewBufferEvent *event = module_of(handle, MODULE_EVENT);
    return event ? DSFlushQueue(event->stream, ACQ_QUEUE_OUTPUT_DISCARD) : last_error();
}

/* End one EventGetData: the one that waits, or the next. */
GC_API EventKill(GENTL_HANDLE handle) {
    NewBufferEvent *event = module_of(handle, MODULE_EVENT);
    if (!event) return last_error();
    g_mutex_lock(&event->stream->mutex);
    if (event->kills < G_MAXUINT - 1) event->kills++;
    g_cond_broadcast(&event->stream->changed);
    g_mutex_unlock(&event->stream->mutex);
    return GC_ERR_SUCCESS;
}
