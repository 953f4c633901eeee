/* What went wrong in this thread, and the one way in which all queries are answered. */
#include "producer.h"

#include <stdarg.h>
#include <string.h>

static _Thread_local char last_text[1024];
static _Thread_local GC_ERROR last_code;

/* Keep the text for GCGetLastError and return the code. */
GC_ERROR fail(GC_ERROR code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    g_vsnprintf(last_text, sizeof last_text, format, arguments);
    va_end(arguments);
    last_code = code;
    return code;
}

/* Return the code of the last failure in this thread. */
GC_ERROR last_error(void) { return last_code; }

static GC_ERROR code_of(const GError *error, GC_ERROR otherwise) {
    if (error->domain != ARV_DEVICE_ERROR) return otherwise;
    switch (error->code) {
        case ARV_DEVICE_ERROR_TIMEOUT: return GC_ERR_TIMEOUT;
        case ARV_DEVICE_ERROR_NOT_CONNECTED: return GC_ERR_IO;
        case ARV_DEVICE_ERROR_NOT_CONTROLLER:
        case ARV_DEVICE_ERROR_PROTOCOL_ERROR_ACCESS_DENIED: return GC_ERR_ACCESS_DENIED;
        case ARV_DEVICE_ERROR_PROTOCOL_ERROR_INVALID_ADDRESS: return GC_ERR_INVALID_ADDRESS;
        case ARV_DEVICE_ERROR_PROTOCOL_ERROR_INVALID_PARAMETER: return GC_ERR_INVALID_PARAMETER;
        case ARV_DEVICE_ERROR_PROTOCOL_ERROR_BUSY: return GC_ERR_BUSY;
        default: return otherwise;
    }
}

/* As fail, with the message of an error of libaravis, which is freed. */
GC_ERROR fail_glib(GError *error, GC_ERROR otherwise, const char *doing) {
    if (!error) return fail(otherwise, "%s failed, libaravis does not say why", doing);
    GC_ERROR code = code_of(error, otherwise);
    fail(code, "%s failed: %s", doing, error->message);
    g_error_free(error);
    return code;
}

GC_API GCGetLastError(GC_ERROR *code, char *text, size_t *size) {
    if (code) *code = last_code;
    return answer_string(last_text, NULL, text, size);
}

/* Answer a query as GenTL wants it: without `out` the size is told, with it the value is copied. */
GC_ERROR answer(INFO_DATATYPE kind, const void *value, gsize bytes, INFO_DATATYPE *type, void *out, size_t *size) {
    if (!size) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the size is NULL");
    if (type) *type = kind;
    if (out && *size < bytes)
        return fail(GC_ERR_BUFFER_TOO_SMALL, "%zu bytes given, %zu are needed", *size, (size_t)bytes);
    if (out) memcpy(out, value, bytes);
    *size = bytes;
    return GC_ERR_SUCCESS;
}

GC_ERROR answer_string(const char *text, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_STRING, text ? text : "", (text ? strlen(text) : 0) + 1, type, out, size);
}

GC_ERROR answer_int32(gint32 value, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_INT32, &value, sizeof value, type, out, size);
}

GC_ERROR answer_uint32(guint32 value, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_UINT32, &value, sizeof value, type, out, size);
}

GC_ERROR answer_uint64(guint64 value, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_UINT64, &value, sizeof value, type, out, size);
}

GC_ERROR answer_size(gsize value, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_SIZET, &value, sizeof value, type, out, size);
}

GC_ERROR answer_bool(gboolean value, INFO_DATATYPE *type, void *out, size_t *size) {
    bool8_t byte = value ? 1 : 0;
    return answer(INFO_DATATYPE_BOOL8, &byte, sizeof byte, type, out, size);
}

GC_ERROR answer_pointer(void *value, INFO_DATATYPE *type, void *out, size_t *size) {
    return answer(INFO_DATATYPE_PTR, &value, sizeof value, type, out, size);
}

GC_ERROR not_available(const char *module, gint32 command) {
    return fail(GC_ERR_NOT_AVAILABLE, "%s has no information number %d", module, command);
}
