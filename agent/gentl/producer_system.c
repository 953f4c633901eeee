/* The library and its system module. There is one interface, which stands for all networks and buses. */
#define _GNU_SOURCE /* dladdr */
#include "producer.h"

#include <dlfcn.h>
#include <string.h>

typedef struct {
    Module module;
} System;

static System the_system;
static GMutex mutex;
static guint initialised, opened;

gboolean library_is_initialised(void) {
    g_mutex_lock(&mutex);
    gboolean is = initialised > 0;
    g_mutex_unlock(&mutex);
    return is;
}

GENTL_HANDLE system_handle(void) { return &the_system; }

/* May be called again: several clients in one process share the library, the last GCCloseLib ends it. */
GC_API GCInitLib(void) {
    g_mutex_lock(&mutex);
    initialised++;
    g_mutex_unlock(&mutex);
    return GC_ERR_SUCCESS;
}

GC_API GCCloseLib(void) {
    g_mutex_lock(&mutex);
    gboolean was = initialised > 0, last = initialised == 1;
    g_mutex_unlock(&mutex);
    if (!was) return fail(GC_ERR_NOT_INITIALIZED, "the library is not initialised: GCCloseLib without GCInitLib");
    if (last) {
        devices_close_all();
        found_clear();
    }
    g_mutex_lock(&mutex);
    initialised--;
    g_mutex_unlock(&mutex);
    return GC_ERR_SUCCESS;
}

/* Return where this library was loaded from; the string lives as long as the library. */
static const char *own_path(void) {
    Dl_info info;
    return dladdr(&the_system, &info) && info.dli_fname ? info.dli_fname : "taktsight.cti";
}

GC_API GCGetInfo(int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    const char *path = own_path(), *slash = strrchr(path, '/');
    switch (command) {
        case TL_INFO_ID: return answer_string("taktsight", type, out, size);
        case TL_INFO_VENDOR: return answer_string(PRODUCER_VENDOR, type, out, size);
        case TL_INFO_MODEL: return answer_string(PRODUCER_MODEL, type, out, size);
        case TL_INFO_VERSION: return answer_string(PRODUCER_VERSION, type, out, size);
        case TL_INFO_TLTYPE: return answer_string("Mixed", type, out, size);
        case TL_INFO_NAME: return answer_string(slash ? slash + 1 : path, type, out, size);
        case TL_INFO_PATHNAME: return answer_string(path, type, out, size);
        case TL_INFO_DISPLAYNAME: return answer_string("taktsight (libaravis)", type, out, size);
        case TL_INFO_CHAR_ENCODING: return answer_int32(TL_CHAR_ENCODING_UTF8, type, out, size);
        case TL_INFO_GENTL_VER_MAJOR: return answer_uint32(1, type, out, size);
        case TL_INFO_GENTL_VER_MINOR: return answer_uint32(5, type, out, size);
        default: return not_available("the system", command);
    }
}

GC_API TLOpen(GENTL_HANDLE *system) {
    if (!library_is_initialised())
        return fail(GC_ERR_NOT_INITIALIZED, "the library is not initialised: call GCInitLib");
    if (!system) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    g_mutex_lock(&mutex);
    if (opened++ == 0) {
        module_begin(&the_system.module, MODULE_SYSTEM);
        module_begin(interface_handle(), MODULE_INTERFACE);
    }
    g_mutex_unlock(&mutex);
    *system = &the_system;
    return GC_ERR_SUCCESS;
}

GC_API TLClose(GENTL_HANDLE system) {
    if (!module_of(system, MODULE_SYSTEM)) return last_error();
    g_mutex_lock(&mutex);
    if (--opened == 0) {
        module_end(&the_system.module);
        module_end(interface_handle());
    }
    g_mutex_unlock(&mutex);
    return GC_ERR_SUCCESS;
}

GC_API TLGetInfo(GENTL_HANDLE system, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    if (!module_of(system, MODULE_SYSTEM)) return last_error();
    return GCGetInfo(command, type, out, size);
}

/* The one interface never comes or goes. */
GC_API TLUpdateInterfaceList(GENTL_HANDLE system, bool8_t *changed, uint64_t timeout_ms) {
    (void)timeout_ms;
    if (!module_of(system, MODULE_SYSTEM)) return last_error();
    if (changed) *changed = 0;
    return GC_ERR_SUCCESS;
}

GC_API TLGetNumInterfaces(GENTL_HANDLE system, uint32_t *count) {
    if (!module_of(system, MODULE_SYSTEM)) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    *count = 1;
    return GC_ERR_SUCCESS;
}

GC_API TLGetInterfaceID(GENTL_HANDLE system, uint32_t index, char *id, size_t *size) {
    if (!module_of(system, MODULE_SYSTEM)) return last_error();
    if (index > 0) return fail(GC_ERR_INVALID_INDEX, "interface %u asked for, there is one, number 0", index);
    return answer_string(INTERFACE_ID, NULL, id, size);
}

static gboolean is_the_interface(const char *id) {
    if (id && strcmp(id, INTERFACE_ID) == 0) return TRUE;
    fail(GC_ERR_INVALID_ID, "interface %s asked for, there is one, " INTERFACE_ID, id ? id : "NULL");
    return FALSE;
}

GC_API TLGetInterfaceInfo(GENTL_HANDLE system, const char *id, int32_t command, INFO_DATATYPE *type, void *out,
                          size_t *size) {
    if (!module_of(system, MODULE_SYSTEM) || !is_the_interface(id)) return last_error();
    return IFGetInfo(interface_handle(), command, type, out, size);
}

GC_API TLOpenInterface(GENTL_HANDLE system, const char *id, GENTL_HANDLE *interface) {
    if (!module_of(system, MODULE_SYSTEM) || !is_the_interface(id)) return last_error();
    if (!interface) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    *interface = interface_handle();
    return GC_ERR_SUCCESS;
}
