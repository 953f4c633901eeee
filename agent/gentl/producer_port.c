/* Ports: the registers of the camera, and the XML that says what they mean. Only the camera has registers; the ports of
 * the producer's own modules say what they are and have none. */
#include "producer.h"

#include <string.h>

#define XML_ADDRESS 0x7f00000000000000u /* where a read of the camera's port gives the description instead */

static Device *camera_of(GENTL_HANDLE handle) {
    ModuleKind kind;
    if (module_kind(handle, &kind) != GC_ERR_SUCCESS) return NULL;
    if (kind == MODULE_PORT) return ((Port *)handle)->device;
    fail(GC_ERR_NOT_AVAILABLE, "this module has no registers: the camera has, see DevGetPort");
    return NULL;
}

static GC_ERROR read_xml(const Device *device, guint64 offset, void *out, size_t *size) {
    if (offset >= device->xml_size)
        return fail(GC_ERR_INVALID_ADDRESS, "byte %" G_GUINT64_FORMAT " of a description of %zu bytes", offset,
                    (size_t)device->xml_size);
    if (*size > device->xml_size - offset) *size = device->xml_size - offset;
    memcpy(out, device->xml + offset, *size);
    return GC_ERR_SUCCESS;
}

GC_API GCReadPort(GENTL_HANDLE port, uint64_t address, void *out, size_t *size) {
    Device *device = camera_of(port);
    if (!device) return last_error();
    if (!out || !size || *size == 0 || *size > G_MAXINT32)
        return fail(GC_ERR_INVALID_PARAMETER, "wanted a place for at least one byte");
    if (address >= XML_ADDRESS) return read_xml(device, address - XML_ADDRESS, out, size);
    return calls_read(device->calls, address, out, *size);
}

GC_API GCWritePort(GENTL_HANDLE port, uint64_t address, const void *in, size_t *size) {
    Device *device = camera_of(port);
    if (!device) return last_error();
    if (!in || !size || *size == 0 || *size > G_MAXINT32)
        return fail(GC_ERR_INVALID_PARAMETER, "wanted at least one byte");
    if (device->read_only) return fail(GC_ERR_ACCESS_DENIED, "the camera is open to be read only");
    return calls_write(device->calls, address, in, *size);
}

/* The stacked calls stop at the first error; `count` becomes how many were done. */
GC_API GCReadPortStacked(GENTL_HANDLE port, PORT_REGISTER_STACK_ENTRY *entries, size_t *count) {
    if (!camera_of(port)) return last_error();
    if (!entries || !count) return fail(GC_ERR_INVALID_PARAMETER, "the list or its length is NULL");
    for (size_t i = 0; i < *count; i++) {
        size_t size = entries[i].Size;
        GC_ERROR result = GCReadPort(port, entries[i].Address, entries[i].pBuffer, &size);
        if (result == GC_ERR_SUCCESS) continue;
        *count = i;
        return result;
    }
    return GC_ERR_SUCCESS;
}

GC_API GCWritePortStacked(GENTL_HANDLE port, PORT_REGISTER_STACK_ENTRY *entries, size_t *count) {
    if (!camera_of(port)) return last_error();
    if (!entries || !count) return fail(GC_ERR_INVALID_PARAMETER, "the list or its length is NULL");
    for (size_t i = 0; i < *count; i++) {
        size_t size = entries[i].Size;
        GC_ERROR result = GCWritePort(port, entries[i].Address, entries[i].pBuffer, &size);
        if (result == GC_ERR_SUCCESS) continue;
        *count = i;
        return result;
    }
    return GC_ERR_SUCCESS;
}

static const char *module_name(ModuleKind kind) {
    switch (kind) {
        case MODULE_SYSTEM: return "TLSystem";
        case MODULE_INTERFACE: return "TLInterface";
        case MODULE_DEVICE: return "TLDevice";
        case MODULE_STREAM: return "TLDataStream";
        case MODULE_BUFFER: return "TLBuffer";
        default: return "Device"; /* the remote one, the camera */
    }
}

GC_API GCGetPortInfo(GENTL_HANDLE port, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    ModuleKind kind;
    if (module_kind(port, &kind) != GC_ERR_SUCCESS) return last_error();
    if (kind == MODULE_EVENT) return fail(GC_ERR_INVALID_HANDLE, "an event has no port");
    const Device *camera = kind == MODULE_PORT ? ((Port *)port)->device : NULL;
    switch (command) {
        case PORT_INFO_ID: return answer_string(camera ? camera->found->id : module_name(kind), type, out, size);
        case PORT_INFO_VENDOR: return answer_string(PRODUCER_VENDOR, type, out, size);
        case PORT_INFO_MODEL: return answer_string(PRODUCER_MODEL, type, out, size);
        case PORT_INFO_TLTYPE: return answer_string(camera ? camera->found->tl_type : "Mixed", type, out, size);
        case PORT_INFO_MODULE: return answer_string(module_name(kind), type, out, size);
        case PORT_INFO_LITTLE_ENDIAN:
            return answer_bool(!camera || strcmp(camera->found->tl_type, "GEV") != 0, type, out, size);
        case PORT_INFO_BIG_ENDIAN:
            return answer_bool(camera && strcmp(camera->found->tl_type, "GEV") == 0, type, out, size);
        case PORT_INFO_ACCESS_READ: return answer_bool(camera != NULL, type, out, size);
        case PORT_INFO_ACCESS_WRITE: return answer_bool(camera && !camera->read_only, type, out, size);
        case PORT_INFO_ACCESS_NA: return answer_bool(FALSE, type, out, size);
        case PORT_INFO_ACCESS_NI: return answer_bool(!camera, type, out, size);
        case PORT_INFO_VERSION: return answer_string(PRODUCER_VERSION, type, out, size);
        case PORT_INFO_PORTNAME: return answer_string(camera ? "Device" : module_name(kind), type, out, size);
        default: return not_available("the port", command);
    }
}

GC_API GCGetNumPortURLs(GENTL_HANDLE port, uint32_t *count) {
    if (!camera_of(port)) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    *count = 1;
    return GC_ERR_SUCCESS;
}

static GC_ERROR answer_url(const Device *camera, INFO_DATATYPE *type, void *out, size_t *size) {
    char *url = g_strdup_printf("local:%s.xml;%" G_GINT64_MODIFIER "X;%zX", camera->found->id, (guint64)XML_ADDRESS,
                                (size_t)camera->xml_size);
    GC_ERROR result = answer_string(url, type, out, size);
    g_free(url);
    return result;
}

static GC_ERROR answer_file_name(const Device *camera, INFO_DATATYPE *type, void *out, size_t *size) {
    char *name = g_strdup_printf("%s.xml", camera->found->id);
    GC_ERROR result = answer_string(name, type, out, size);
    g_free(name);
    return result;
}

GC_API GCGetPortURLInfo(GENTL_HANDLE port, uint32_t index, int32_t command, INFO_DATATYPE *type, void *out,
                        size_t *size) {
    const Device *camera = camera_of(port);
    if (!camera) return last_error();
    if (index > 0) return fail(GC_ERR_INVALID_INDEX, "description %u asked for, there is one, number 0", index);
    switch (command) {
        case URL_INFO_URL: return answer_url(camera, type, out, size);
        case URL_INFO_SCHEMA_VER_MAJOR:
        case URL_INFO_SCHEMA_VER_MINOR: return answer_int32(1, type, out, size);
        case URL_INFO_FILE_REGISTER_ADDRESS: return answer_uint64(XML_ADDRESS, type, out, size);
        case URL_INFO_FILE_SIZE: return answer_uint64(camera->xml_size, type, out, size);
        case URL_INFO_SCHEME: return answer_int32(0, type, out, size); /* local */
        case URL_INFO_FILENAME: return answer_file_name(camera, type, out, size);
        default: return not_available("the description", command);
    }
}

GC_API GCGetPortURL(GENTL_HANDLE port, char *url, size_t *size) {
    const Device *camera = camera_of(port);
    return camera ? answer_url(camera, NULL, url, size) : last_error();
}
