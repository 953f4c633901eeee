/* Functions of GenTL 1.6 and 1.7, for payloads of several parts. The cameras that this producer is for send one picture
 * in one buffer; a client learns so from each function, and from the version that GCGetInfo tells. */
#include "producer.h"

static GC_ERROR not_implemented(GENTL_HANDLE stream, const char *function) {
    if (!module_of(stream, MODULE_STREAM)) return last_error();
    return fail(GC_ERR_NOT_IMPLEMENTED, "%s is not implemented: this producer follows GenTL 1.5", function);
}

GC_API DSAnnounceCompositeBuffer(GENTL_HANDLE stream, size_t segments, void **memory, size_t *sizes, void *user,
                                 GENTL_HANDLE *buffer) {
    (void)segments, (void)memory, (void)sizes, (void)user, (void)buffer;
    return not_implemented(stream, __func__);
}

GC_API DSGetBufferInfoStacked(GENTL_HANDLE stream, GENTL_HANDLE buffer, void *entries, size_t count) {
    (void)buffer, (void)entries, (void)count;
    return not_implemented(stream, __func__);
}

GC_API DSGetBufferPartInfoStacked(GENTL_HANDLE stream, GENTL_HANDLE buffer, void *entries, size_t count) {
    (void)buffer, (void)entries, (void)count;
    return not_implemented(stream, __func__);
}

GC_API DSGetNumFlows(GENTL_HANDLE stream, uint32_t *count) {
    (void)count;
    return not_implemented(stream, __func__);
}

GC_API DSGetFlowInfo(GENTL_HANDLE stream, uint32_t index, int32_t command, INFO_DATATYPE *type, void *out,
                     size_t *size) {
    (void)index, (void)command, (void)type, (void)out, (void)size;
    return not_implemented(stream, __func__);
}

GC_API DSGetNumBufferSegments(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t *count) {
    (void)buffer, (void)count;
    return not_implemented(stream, __func__);
}

GC_API DSGetBufferSegmentInfo(GENTL_HANDLE stream, GENTL_HANDLE buffer, uint32_t index, int32_t command,
                              INFO_DATATYPE *type, void *out, size_t *size) {
    (void)buffer, (void)index, (void)command, (void)type, (void)out, (void)size;
    return not_implemented(stream, __func__);
}
