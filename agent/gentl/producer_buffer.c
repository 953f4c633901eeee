/* Announcing buffers, and what is in them. */
#include "producer.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 };

/* Return the buffer, if it is one of the stream; else say the error and return NULL. */
static Buffer *buffer_of(Stream *stream, GENTL_HANDLE handle) {
    Buffer *buffer = stream ? module_of(handle, MODULE_BUFFER) : NULL;
    if (!buffer || buffer->stream == stream) return buffer;
    fail(GC_ERR_INVALID_HANDLE, "the buffer belongs to another data stream");
    return NULL;
}

static GC_ERROR announce(Stream *stream, void *memory, size_t size, void *user, gboolean owns, GENTL_HANDLE *result) {
    Buffer *buffer = g_new0(Buffer, 1);
    buffer->stream = stream;
    buffer->arv = arv_buffer_new_full(size, memory, buffer, NULL);
    buffer->memory = memory;
    buffer->size = size;
    buffer->owns_memory = owns;
    buffer->user = user;
    module_begin(&buffer->module, MODULE_BUFFER);
    g_mutex_lock(&stream->mutex);
    g_ptr_array_add(stream->buffers, buffer);
    g_mutex_unlock(&stream->mutex);
    *result = buffer;
    return GC_ERR_SUCCESS;
}

GC_API DSAnnounceBuffer(GENTL_HANDLE handle, void *memory, size_t size, void *user, GENTL_HANDLE *buffer) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    if (!memory || size == 0 || !buffer) return fail(GC_ERR_INVALID_PARAMETER, "wanted memory of at least one byte");
    return announce(stream, memory, size, user, FALSE, buffer);
}

GC_API DSAllocAndAnnounceBuffer(GENTL_HANDLE handle, size_t size, void *user, GENTL_HANDLE *buffer) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    if (size == 0 || !buffer) return fail(GC_ERR_INVALID_PARAMETER, "wanted a buffer of at least one byte");
    void *memory = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (!memory) return fail(GC_ERR_OUT_OF_MEMORY, "no memory for a buffer of %zu bytes", size);
    return announce(stream, memory, size, user, TRUE, buffer);
}

GC_API DSRevokeBuffer(GENTL_HANDLE handle, GENTL_HANDLE buffer_handle, void **memory, void **user) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    Buffer *buffer = buffer_of(stream, buffer_handle);
    if (!buffer) return last_error();
    g_mutex_lock(&stream->mutex);
    gboolean busy = buffer->state != BUFFER_IDLE;
    if (!busy) g_ptr_array_remove(stream->buffers, buffer);
    g_mutex_unlock(&stream->mutex);
    if (busy) return fail(GC_ERR_BUSY, "the buffer is queued: flush the queues first");
    if (memory) *memory = buffer->owns_memory ? NULL : buffer->memory;
    if (user) *user = buffer->user;
    module_end(&buffer->module);
    g_object_unref(buffer->arv);
    if (buffer->owns_memory) free(buffer->memory);
    g_free(buffer);
    return GC_ERR_SUCCESS;
}

GC_API DSQueueBuffer(GENTL_HANDLE handle, GENTL_HANDLE buffer_handle) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    Buffer *buffer = buffer_of(stream, buffer_handle);
    if (!buffer) return last_error();
    g_mutex_lock(&stream->mutex);
    gboolean busy = buffer->state != BUFFER_IDLE;
    if (!busy) buffer_to_input(buffer);
    g_mutex_unlock(&stream->mutex);
    return busy ? fail(GC_ERR_RESOURCE_IN_USE, "the buffer is queued already") : GC_ERR_SUCCESS;
}

GC_API DSGetBufferID(GENTL_HANDLE handle, uint32_t index, GENTL_HANDLE *buffer) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    if (!stream) return last_error();
    if (!buffer) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    g_mutex_lock(&stream->mutex);
    guint count = stream->buffers->len;
    if (index < count) *buffer = stream->buffers->pdata[index];
    g_mutex_unlock(&stream->mutex);
    return index < count ? GC_ERR_SUCCESS
                         : fail(GC_ERR_INVALID_INDEX, "buffer %u asked for, there are %u", index, count);
}

static gboolean is_complete(const Buffer *buffer) {
    return arv_buffer_get_status(buffer->arv) == ARV_BUFFER_STATUS_SUCCESS;
}

static gboolean has_chunks(const Buffer *buffer) { return is_complete(buffer) && arv_buffer_has_chunks(buffer->arv); }

/* Whether there is a picture with a size and a format; in an incomplete frame its leader may be what was lost. */
static gboolean has_image(const Buffer *buffer) {
    ArvBufferPayloadType payload = arv_buffer_get_payload_type(buffer->arv);
    return is_complete(buffer) && (payload == ARV_BUFFER_PAYLOAD_TYPE_IMAGE || arv_buffer_has_chunks(buffer->arv));
}

/* The leader of a frame has its id and time; where it was lost they are not known. Ids begin at 1. */
static gboolean has_leader(const Buffer *buffer) { return arv_buffer_get_frame_id(buffer->arv) != 0; }

static gsize filled_bytes(const Buffer *buffer) {
    gsize bytes = 0;
    arv_buffer_get_data(buffer->arv, &bytes);
    return bytes;
}

/* Answer what needs a picture in the buffer. */
static GC_ERROR answer_image(const Buffer *buffer, gint32 command, INFO_DATATYPE *type, void *out, size_t *size) {
    gint x_padding = 0, y_padding = 0;
    if (!has_image(buffer)) return fail(GC_ERR_NOT_AVAILABLE, "there is no complete picture in the buffer");
    arv_buffer_get_image_padding(buffer->arv, &x_padding, &y_padding);
    switch (command) {
        case BUFFER_INFO_WIDTH: return answer_size((gsize)arv_buffer_get_image_width(buffer->arv), type, out, size);
        case BUFFER_INFO_HEIGHT:
        case BUFFER_INFO_DELIVERED_IMAGEHEIGHT:
            return answer_size((gsize)arv_buffer_get_image_height(buffer->arv), type, out, size);
        case BUFFER_INFO_XOFFSET: return answer_size((gsize)arv_buffer_get_image_x(buffer->arv), type, out, size);
        case BUFFER_INFO_YOFFSET: return answer_size((gsize)arv_buffer_get_image_y(buffer->arv), type, out, size);
        case BUFFER_INFO_XPADDING: return answer_size((gsize)x_padding, type, out, size);
        case BUFFER_INFO_YPADDING: return answer_size((gsize)y_padding, type, out, size);
        case BUFFER_INFO_IMAGEOFFSET: return answer_size(0, type, out, size);
        case BUFFER_INFO_PIXELFORMAT:
            return answer_uint64(arv_buffer_get_image_pixel_format(buffer->arv), type, out, size);
        case BUFFER_INFO_PIXELFORMAT_NAMESPACE: return answer_uint64(PIXELFORMAT_NAMESPACE_PFNC_32BIT, type, out, size);
        case BUFFER_INFO_PIXEL_ENDIANNESS: return answer_int32(PIXELENDIANNESS_LITTLE, type, out, size);
        default: return not_available("the buffer", command);
    }
}

/* Answer what a filled buffer has, picture or not. */
static GC_ERROR answer_filled(const Buffer *buffer, gint32 command, INFO_DATATYPE *type, void *out, size_t *size) {
    ArvBufferStatus status = arv_buffer_get_status(buffer->arv);
    gboolean of_leader =
        command == BUFFER_INFO_TIMESTAMP || command == BUFFER_INFO_TIMESTAMP_NS || command == BUFFER_INFO_FRAMEID;
    if (of_leader && !has_leader(buffer))
        return fail(GC_ERR_NOT_AVAILABLE, "the leader of the frame was lost, and with it the frame's id and time");
    switch (command) {
        case BUFFER_INFO_TIMESTAMP:
        case BUFFER_INFO_TIMESTAMP_NS: return answer_uint64(arv_buffer_get_timestamp(buffer->arv), type, out, size);
        case BUFFER_INFO_NEW_DATA: return answer_bool(buffer->new_data, type, out, size);
        case BUFFER_INFO_IS_ACQUIRING: return answer_bool(FALSE, type, out, size);
        case BUFFER_INFO_IS_INCOMPLETE: return answer_bool(!is_complete(buffer), type, out, size);
        case BUFFER_INFO_DATA_LARGER_THAN_BUFFER:
            return answer_bool(status == ARV_BUFFER_STATUS_SIZE_MISMATCH, type, out, size);
        case BUFFER_INFO_FRAMEID: return answer_uint64(arv_buffer_get_frame_id(buffer->arv), type, out, size);
        case BUFFER_INFO_SIZE_FILLED:
        case BUFFER_INFO_DATA_SIZE: return answer_size(filled_bytes(buffer), type, out, size);
        case BUFFER_INFO_IMAGEPRESENT: return answer_bool(has_image(buffer), type, out, size);
        case BUFFER_INFO_PAYLOADTYPE:
            return answer_size(has_image(buffer) ? PAYLOAD_TYPE_IMAGE : PAYLOAD_TYPE_UNKNOWN, type, out, size);
        case BUFFER_INFO_CONTAINS_CHUNKDATA: return answer_bool(has_chunks(buffer), type, out, size);
        case BUFFER_INFO_DELIVERED_CHUNKPAYLOADSIZE:
            return answer_size(has_chunks(buffer) ? filled_bytes(buffer) : 0, type, out, size);
        default: return answer_image(buffer, command, type, out, size);
    }
}

GC_API DSGetBufferInfo(GENTL_HANDLE handle, GENTL_HANDLE buffer_handle, int32_t command, INFO_DATATYPE *type, void *out,
                       size_t *size) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    const Buffer *buffer = buffer_of(stream, buffer_handle);
    if (!buffer) return last_error();
    g_mutex_lock(&stream->mutex);
    gboolean queued = buffer->state != BUFFER_IDLE, acquiring = queued && stream->running;
    g_mutex_unlock(&stream->mutex);
    switch (command) {
        case BUFFER_INFO_BASE: return answer_pointer(buffer->memory, type, out, size);
        case BUFFER_INFO_SIZE: return answer_size(buffer->size, type, out, size);
        case BUFFER_INFO_USER_PTR: return answer_pointer(buffer->user, type, out, size);
        case BUFFER_INFO_IS_QUEUED: return answer_bool(queued, type, out, size);
        case BUFFER_INFO_TLTYPE: return answer_string(stream->device->found->tl_type, type, out, size);
        default: break;
    }
    if (queued && command == BUFFER_INFO_IS_ACQUIRING) return answer_bool(acquiring, type, out, size);
    if (queued) return fail(GC_ERR_NO_DATA, "the buffer is queued: what is in it is not settled");
    return answer_filled(buffer, command, type, out, size);
}

/* Each chunk is followed by its id and length, four bytes each; so they are read from the end. */
static gsize parse_chunks(const guint8 *data, gsize bytes, gboolean big_endian, SINGLE_CHUNK_DATA *chunks, gsize most) {
    gsize count = 0, end = bytes;
    while (end >= 8) {
        guint32 id, length;
        memcpy(&id, data + end - 8, 4);
        memcpy(&length, data + end - 4, 4);
        id = big_endian ? GUINT32_FROM_BE(id) : GUINT32_FROM_LE(id);
        length = big_endian ? GUINT32_FROM_BE(length) : GUINT32_FROM_LE(length);
        if (length > end - 8) return 0; /* no chunk begins before the buffer does */
        end -= 8 + length;
        if (chunks && count < most)
            chunks[count] = (SINGLE_CHUNK_DATA){.ChunkID = id, .ChunkOffset = (ptrdiff_t)end, .ChunkLength = length};
        count++;
    }
    return end == 0 ? count : 0;
}

GC_API DSGetBufferChunkData(GENTL_HANDLE handle, GENTL_HANDLE buffer_handle, SINGLE_CHUNK_DATA *chunks, size_t *count) {
    Stream *stream = module_of(handle, MODULE_STREAM);
    const Buffer *buffer = buffer_of(stream, buffer_handle);
    if (!buffer) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    if (buffer->state != BUFFER_IDLE || !has_chunks(buffer))
        return fail(GC_ERR_NO_DATA, "there are no chunks in the buffer");
    gboolean big_endian = strcmp(stream->device->found->tl_type, "GEV") == 0;
    gsize found = parse_chunks(buffer->memory, filled_bytes(buffer), big_endian, chunks, *count);
    if (found == 0)
        return fail(GC_ERR_PARSING_CHUNK_DATA, "the chunks do not fit into the %zu bytes of the buffer",
                    (size_t)filled_bytes(buffer));
    if (chunks && *count < found)
        return fail(GC_ERR_BUFFER_TOO_SMALL, "%zu places given, there are %zu chunks", *count, (size_t)found);
    *count = found;
    return GC_ERR_SUCCESS;
}

/* No multi-part payload: a picture is the whole of a frame. */
GC_API DSGetNumBufferParts(GENTL_HANDLE handle, GENTL_HANDLE buffer, uint32_t *count) {
    if (!buffer_of(module_of(handle, MODULE_STREAM), buffer)) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    *count = 0;
    return GC_ERR_SUCCESS;
}

GC_API DSGetBufferPartInfo(GENTL_HANDLE handle, GENTL_HANDLE buffer, uint32_t part, int32_t command,
                           INFO_DATATYPE *type, void *out, size_t *size) {
    (void)command, (void)type, (void)out, (void)size;
    if (!buffer_of(module_of(handle, MODULE_STREAM), buffer)) return last_error();
    return fail(GC_ERR_INVALID_INDEX, "part %u asked for, the payload has none", part);
}
