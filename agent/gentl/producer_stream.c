/* The data stream: starting and stopping, and the way of the buffers.
 *
 *   IDLE --DSQueueBuffer--> QUEUED --a frame arrived--> FILLED --EventGetData--> IDLE
 *
 * While frames are acquired libaravis holds the QUEUED buffers, in no order of ours; otherwise nobody does. Its thread
 * writes into the memory of a buffer, so that thread is stopped before anything is taken away from it.
 */
#include "producer.h"

#include <stdlib.h>
#include <string.h>

#define PACKET_TIMEOUT_US 5000   /* before a lost packet is asked for again */
#define FRAME_RETENTION_US 25000 /* of silence, after which a frame with packets missing is given up */
#define SOCKET_BYTES (32 << 20)  /* wanted; the kernel gives up to net.core.rmem_max */

/* Hand a buffer to the acquisition. With the stream's mutex held. */
void buffer_to_input(Buffer *buffer) {
    buffer->state = BUFFER_QUEUED;
    buffer->new_data = FALSE;
    arv_buffer_set_frame_id(buffer->arv, 0); /* or a frame whose leader is lost would bear the id of an older one */
    if (buffer->stream->fed) arv_stream_push_buffer(buffer->stream->arv, g_object_ref(buffer->arv));
}

static void take_filled(Stream *stream, ArvBuffer *arv) {
    Buffer *buffer = (Buffer *)arv_buffer_get_user_data(arv);
    g_mutex_lock(&stream->mutex);
    stream->started++;
    if (arv_buffer_get_status(arv) == ARV_BUFFER_STATUS_ABORTED) {
        buffer_to_input(buffer); /* cut off by the end of the acquisition, not by the network */
    } else {
        buffer->state = BUFFER_FILLED;
        buffer->new_data = TRUE;
        g_queue_push_tail(&stream->filled, buffer);
        g_cond_broadcast(&stream->changed);
    }
    g_mutex_unlock(&stream->mutex);
}

/* Is called in the thread of libaravis, which has put the buffer into its output queue before. */
static void on_stream(void *pointer, ArvStreamCallbackType type, ArvBuffer *unused) {
    Stream *stream = pointer;
    (void)unused;
    if (type != ARV_STREAM_CALLBACK_TYPE_BUFFER_DONE) return; /* `stream` may be gone, see calls_create_stream */
    for (ArvBuffer *arv; (arv = arv_stream_try_pop_buffer(stream->arv)); g_object_unref(arv)) take_filled(stream, arv);
}

static guint microseconds_of(const char *variable, guint otherwise) {
    const char *text = g_getenv(variable);
    guint64 milliseconds = text ? g_ascii_strtoull(text, NULL, 10) : 0;
    return milliseconds >= 1 && milliseconds <= 10000 ? (guint)milliseconds * 1000 : otherwise;
}

/* Stop the thread of libaravis; the buffers that it held stay QUEUED. With `control` held. */
static void pause_acquisition(Stream *stream) {
    g_mutex_lock(&stream->mutex);
    stream->fed = FALSE;
    g_mutex_unlock(&stream->mutex);
    arv_stream_stop_thread(stream->arv, TRUE);
}

static void resume_acquisition(Stream *stream) {
    g_mutex_lock(&stream->mutex);
    stream->fed = TRUE;
    for (guint i = 0; i < stream->buffers->len; i++) {
        Buffer *buffer = stream->buffers->pdata[i];
        if (buffer->state == BUFFER_QUEUED) buffer_to_input(buffer);
    }
    g_mutex_unlock(&stream->mutex);
    arv_stream_start_thread(stream->arv);
}

GC_API DevOpenDataStream(GENTL_HANDLE handle, const char *id, GENTL_HANDLE *result) {
    Device *device = module_of(handle, MODULE_DEVICE);
    if (!device) return last_error();
    if (!result) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    if (g_strcmp0(id, STREAM_ID) != 0)
        return fail(GC_ERR_INVALID_ID, "data stream %s asked for, there is one, " STREAM_ID, id ? id : "NULL");
    if (device->stream) return fail(GC_ERR_RESOURCE_IN_USE, "the data stream is open already");
    if (ARV_IS_GV_DEVICE(device->arv)) /* a plain socket gives a packet at once, the packet socket after up to 5 ms */
        arv_gv_device_set_stream_options(ARV_GV_DEVICE(device->arv), ARV_GV_STREAM_OPTION_PACKET_SOCKET_DISABLED);
    Stream *stream = g_new0(Stream, 1);
    ArvStream *arv = NULL;
    GC_ERROR error = calls_create_stream(device->calls, on_stream, stream, &arv);
    if (error != GC_ERR_SUCCESS) {
        g_free(stream);
        return error;
    }
    arv_stream_stop_thread(arv, FALSE);
    if (ARV_IS_GV_STREAM(arv))
        g_object_set(arv, "packet-timeout", PACKET_TIMEOUT_US, "frame-retention",
                     microseconds_of("TAKTSIGHT_GENTL_FRAME_RETENTION_MS", FRAME_RETENTION_US), "packet-request-ratio",
                     1.0, "socket-buffer", ARV_GV_STREAM_SOCKET_BUFFER_FIXED, "socket-buffer-size", SOCKET_BYTES, NULL);
    stream->device = device;
    stream->arv = arv;
    stream->buffers = g_ptr_array_new();
    g_mutex_init(&stream->control);
    g_mutex_init(&stream->mutex);
    g_cond_init(&stream->changed);
    g_queue_init(&stream->filled);
    module_begin(&stream->module, MODULE_STREAM);
    device->stream = stream;
    *result = stream;
    return GC_ERR_SUCCESS;
}

/* Return how often something found no buffer. libaravis counts each packet of such a frame. */
static guint64 all_underruns(Stream *stream) {
    guint64 completed = 0, failed = 0, underruns = 0;
    arv_stream_get_statistics(stream->arv, &completed, &failed, &underruns);
    return underruns;
}

GC_API DSStartAcquisition(GENTL_HANDLE handle, int32_t flags, uint64_t frames) {
    (void)flags;
    (void)frames; /* the camera counts them, by AcquisitionMode and AcquisitionFrameCount */
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    g_mutex_lock(&stream->control);
    gboolean was_running = stream->running;
    if (!was_running) {
        g_mutex_lock(&stream->mutex);
        stream->running = TRUE;
        stream->started = stream->delivered = 0;
        stream->underruns_before = all_underruns(stream);
        g_mutex_unlock(&stream->mutex);
        resume_acquisition(stream);
    }
    g_mutex_unlock(&stream->control);
    return was_running ? fail(GC_ERR_RESOURCE_IN_USE, "frames are being acquired already") : GC_ERR_SUCCESS;
}

GC_API DSStopAcquisition(GENTL_HANDLE handle, int32_t flags) {
    (void)flags;
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    g_mutex_lock(&stream->control);
    gboolean was_running = stream->running;
    if (was_running) {
        pause_acquisition(stream);
        g_mutex_lock(&stream->mutex);
        stream->running = FALSE;
        g_cond_broadcast(&stream->changed);
        g_mutex_unlock(&stream->mutex);
    }
    g_mutex_unlock(&stream->control);
    return was_running ? GC_ERR_SUCCESS : fail(GC_ERR_RESOURCE_IN_USE, "no frames are being acquired");
}

/* Move one buffer as the operation says. With the mutex held, and libaravis holding no buffer. */
static void move_buffer(Buffer *buffer, gint32 operation) {
    gboolean queued = buffer->state == BUFFER_QUEUED, filled = buffer->state == BUFFER_FILLED;
    switch (operation) {
        case ACQ_QUEUE_INPUT_TO_OUTPUT:
            if (!queued) return;
            buffer->state = BUFFER_FILLED;
            g_queue_push_tail(&buffer->stream->filled, buffer);
            return;
        case ACQ_QUEUE_OUTPUT_DISCARD:
            if (filled) buffer->state = BUFFER_IDLE;
            return;
        case ACQ_QUEUE_ALL_TO_INPUT:
            if (filled) buffer->state = BUFFER_QUEUED;
            return;
        case ACQ_QUEUE_UNQUEUED_TO_INPUT:
            if (!queued && !filled) buffer->state = BUFFER_QUEUED;
            return;
        default: buffer->state = BUFFER_IDLE;
    }
}

GC_API DSFlushQueue(GENTL_HANDLE handle, int32_t operation) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    if (operation < ACQ_QUEUE_INPUT_TO_OUTPUT || operation > ACQ_QUEUE_ALL_DISCARD)
        return fail(GC_ERR_INVALID_PARAMETER, "operation %d asked for, wanted 0 to 4", operation);
    g_mutex_lock(&stream->control);
    if (stream->running) pause_acquisition(stream);
    g_mutex_lock(&stream->mutex);
    gboolean empties_output = operation != ACQ_QUEUE_INPUT_TO_OUTPUT && operation != ACQ_QUEUE_UNQUEUED_TO_INPUT;
    if (empties_output) g_queue_clear(&stream->filled);
    for (guint i = 0; i < stream->buffers->len; i++) move_buffer(stream->buffers->pdata[i], operation);
    g_cond_broadcast(&stream->changed);
    g_mutex_unlock(&stream->mutex);
    if (stream->running) resume_acquisition(stream);
    g_mutex_unlock(&stream->control);
    return GC_ERR_SUCCESS;
}

/* Stop, wake who waits, and give everything back; to the camera, should it be alive. */
GC_ERROR stream_close(Stream *stream) {
    if (stream->running) DSStopAcquisition(stream, ACQ_STOP_FLAGS_KILL);
    if (stream->event) GCUnregisterEvent(stream, EVENT_NEW_BUFFER);
    while (stream->buffers->len > 0) {
        DSFlushQueue(stream, ACQ_QUEUE_ALL_DISCARD);
        DSRevokeBuffer(stream, stream->buffers->pdata[0], NULL, NULL);
    }
    module_end(&stream->module);
    stream->device->stream = NULL;
    arv_stream_start_thread(stream->arv); /* libaravis wants to stop it itself */
    calls_release_stream(stream->device->calls, g_steal_pointer(&stream->arv));
    g_ptr_array_unref(stream->buffers);
    g_mutex_clear(&stream->control);
    g_mutex_clear(&stream->mutex);
    g_cond_clear(&stream->changed);
    g_free(stream);
    return GC_ERR_SUCCESS;
}

GC_API DSClose(GENTL_HANDLE handle) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    return stream ? stream_close(stream) : last_error();
}

GC_API DSGetParentDev(GENTL_HANDLE handle, GENTL_HANDLE *device) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    if (!device) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    *device = stream->device;
    return GC_ERR_SUCCESS;
}

static gsize count_in(Stream *stream, BufferState state) {
    gsize count = 0;
    g_mutex_lock(&stream->mutex);
    for (guint i = 0; i < stream->buffers->len; i++) count += ((Buffer *)stream->buffers->pdata[i])->state == state;
    g_mutex_unlock(&stream->mutex);
    return count;
}

GC_API DSGetInfo(GENTL_HANDLE handle, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    switch (command) {
        case STREAM_INFO_ID: return answer_string(STREAM_ID, type, out, size);
        case STREAM_INFO_NUM_DELIVERED: return answer_uint64(stream->delivered, type, out, size);
        case STREAM_INFO_NUM_UNDERRUN:
            return answer_uint64(all_underruns(stream) - stream->underruns_before, type, out, size);
        case STREAM_INFO_NUM_ANNOUNCED: return answer_size(stream->buffers->len, type, out, size);
        case STREAM_INFO_NUM_QUEUED: return answer_size(count_in(stream, BUFFER_QUEUED), type, out, size);
        case STREAM_INFO_NUM_AWAIT_DELIVERY: return answer_size(count_in(stream, BUFFER_FILLED), type, out, size);
        case STREAM_INFO_NUM_STARTED: return answer_uint64(stream->started, type, out, size);
        case STREAM_INFO_IS_GRABBING: return answer_bool(stream->running, type, out, size);
        case STREAM_INFO_DEFINES_PAYLOADSIZE:
            return answer_bool(FALSE, type, out, size); /* the camera's PayloadSize does */
        case STREAM_INFO_TLTYPE: return answer_string(stream->device->found->tl_type, type, out, size);
        case STREAM_INFO_NUM_CHUNKS_MAX: return answer_size(64, type, out, size);
        case STREAM_INFO_BUF_ANNOUNCE_MIN: return answer_size(1, type, out, size);
        case STREAM_INFO_BUF_ALIGNMENT: return answer_size(1, type, out, size);
        default: return not_available("the data stream", command);
    }
}
