/* Which cameras there are. Cameras that a broadcast does not reach are named in TAKTSIGHT_GENTL_ADDRESSES. */
#include "producer.h"

#include <string.h>

enum { UNICAST_MS = 300 }; /* how long a camera that is searched by its address may take to answer */

typedef struct {
    Module module;
} Interface;

static Interface the_interface;
static GMutex mutex;
static GPtrArray *found; /* Found*, of the last search */

GENTL_HANDLE interface_handle(void) { return &the_interface; }

void found_free(gpointer pointer) {
    Found *camera = pointer;
    g_free(camera->id);
    g_free(camera->vendor);
    g_free(camera->model);
    g_free(camera->serial);
    g_free(camera->address);
    g_free(camera->tl_type);
    g_free(camera);
}

void found_clear(void) {
    g_mutex_lock(&mutex);
    g_clear_pointer(&found, g_ptr_array_unref);
    g_mutex_unlock(&mutex);
}

static Found *found_copy(const Found *camera) {
    Found *copy = g_new0(Found, 1);
    *copy = (Found){.id = g_strdup(camera->id),
                    .vendor = g_strdup(camera->vendor),
                    .model = g_strdup(camera->model),
                    .serial = g_strdup(camera->serial),
                    .address = g_strdup(camera->address),
                    .tl_type = g_strdup(camera->tl_type)};
    return copy;
}

static const char *tl_type_of(const char *protocol) {
    if (g_strcmp0(protocol, "GigEVision") == 0) return "GEV";
    return g_strcmp0(protocol, "USB3Vision") == 0 ? "U3V" : "Custom";
}

static void add_by_broadcast(GPtrArray *cameras) {
    arv_update_device_list();
    for (guint i = 0; i < arv_get_n_devices(); i++) {
        Found *camera = g_new0(Found, 1);
        camera->id = g_strdup(arv_get_device_id(i));
        camera->vendor = g_strdup(arv_get_device_vendor(i));
        camera->model = g_strdup(arv_get_device_model(i));
        camera->serial = g_strdup(arv_get_device_serial_nbr(i));
        camera->address = g_strdup(arv_get_device_address(i));
        camera->tl_type = g_strdup(tl_type_of(arv_get_device_protocol(i)));
        g_ptr_array_add(cameras, camera);
    }
}

static gboolean has_address(const GPtrArray *cameras, const char *address) {
    for (guint i = 0; i < cameras->len; i++)
        if (g_strcmp0(((Found *)cameras->pdata[i])->address, address) == 0) return TRUE;
    return FALSE;
}

/* Return the camera that gave this answer to a discovery request. */
static Found *found_at(const char *address, const guint8 *answer) {
    enum { VENDOR = 0x48, MODEL = 0x68, SERIAL = 0xd8, NAME_BYTES = 32, SERIAL_BYTES = 16 };
    Found *camera = g_new0(Found, 1);
    camera->id = g_strdup(address);
    camera->address = g_strdup(address);
    camera->vendor = g_strndup((const char *)answer + VENDOR, NAME_BYTES);
    camera->model = g_strndup((const char *)answer + MODEL, NAME_BYTES);
    camera->serial = g_strndup((const char *)answer + SERIAL, SERIAL_BYTES);
    camera->tl_type = g_strdup("GEV");
    return camera;
}

static void add_by_address(GPtrArray *cameras) {
    const char *list = g_getenv("TAKTSIGHT_GENTL_ADDRESSES");
    char **addresses = g_strsplit(list ? list : "", ",", -1);
    for (char **address = addresses; *address; address++) {
        guint8 answer[DISCOVERY_BYTES];
        g_strstrip(*address);
        if (**address && !has_address(cameras, *address) && camera_answers(*address, UNICAST_MS, answer))
            g_ptr_array_add(cameras, found_at(*address, answer));
    }
    g_strfreev(addresses);
}

static gboolean same_cameras(const GPtrArray *a, const GPtrArray *b) {
    if (!a || a->len != b->len) return FALSE;
    for (guint i = 0; i < a->len; i++) {
        const Found *one = a->pdata[i], *other = b->pdata[i];
        if (g_strcmp0(one->id, other->id) != 0 || g_strcmp0(one->address, other->address) != 0) return FALSE;
    }
    return TRUE;
}

/* Search, which takes a second whatever the timeout: libaravis waits so long for answers. */
GC_API IFUpdateDeviceList(GENTL_HANDLE interface, bool8_t *changed, uint64_t timeout_ms) {
    (void)timeout_ms;
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    GPtrArray *cameras = g_ptr_array_new_with_free_func(found_free);
    static GMutex searching; /* libaravis has one list for the process */
    g_mutex_lock(&searching);
    add_by_broadcast(cameras);
    g_mutex_unlock(&searching);
    add_by_address(cameras);
    g_mutex_lock(&mutex);
    if (changed) *changed = !same_cameras(found, cameras);
    g_clear_pointer(&found, g_ptr_array_unref);
    found = cameras;
    g_mutex_unlock(&mutex);
    return GC_ERR_SUCCESS;
}

/* Return the camera with this id, or NULL with the error said. With the mutex held. */
static const Found *found_with(const char *id) {
    for (guint i = 0; found && id && i < found->len; i++)
        if (strcmp(((Found *)found->pdata[i])->id, id) == 0) return found->pdata[i];
    fail(GC_ERR_INVALID_ID,
         "camera %s was not found in the last search, which found %u: check cable, power and address, "
         "then update the device list",
         id ? id : "NULL", found ? found->len : 0);
    return NULL;
}

static GC_ERROR answer_display_name(const Found *camera, INFO_DATATYPE *type, void *out, size_t *size) {
    char *name = g_strdup_printf("%s %s (%s) at %s", camera->vendor, camera->model, camera->serial, camera->address);
    GC_ERROR result = answer_string(name, type, out, size);
    g_free(name);
    return result;
}

/* Answer a query about a camera. */
GC_ERROR found_answer(const Found *camera, gint32 command, INFO_DATATYPE *type, void *out, size_t *size) {
    switch (command) {
        case DEVICE_INFO_ID: return answer_string(camera->id, type, out, size);
        case DEVICE_INFO_VENDOR: return answer_string(camera->vendor, type, out, size);
        case DEVICE_INFO_MODEL: return answer_string(camera->model, type, out, size);
        case DEVICE_INFO_TLTYPE: return answer_string(camera->tl_type, type, out, size);
        case DEVICE_INFO_DISPLAYNAME: return answer_display_name(camera, type, out, size);
        case DEVICE_INFO_ACCESS_STATUS: return answer_int32(device_access_status(camera->id), type, out, size);
        case DEVICE_INFO_SERIAL_NUMBER: return answer_string(camera->serial, type, out, size);
        case DEVICE_INFO_TIMESTAMP_FREQUENCY:
            return answer_uint64(1000000000, type, out, size); /* libaravis gives ns */
        default: return not_available("the camera", command);
    }
}

GC_API IFClose(GENTL_HANDLE interface) {
    return module_of(interface, MODULE_INTERFACE) ? GC_ERR_SUCCESS : last_error();
}

GC_API IFGetInfo(GENTL_HANDLE interface, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    switch (command) {
        case INTERFACE_INFO_ID: return answer_string(INTERFACE_ID, type, out, size);
        case INTERFACE_INFO_DISPLAYNAME: return answer_string("all networks and USB buses", type, out, size);
        case INTERFACE_INFO_TLTYPE: return answer_string("Mixed", type, out, size);
        default: return not_available("the interface", command);
    }
}

GC_API IFGetParentTL(GENTL_HANDLE interface, GENTL_HANDLE *system) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    if (!system) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    *system = system_handle();
    return GC_ERR_SUCCESS;
}

GC_API IFGetNumDevices(GENTL_HANDLE interface, uint32_t *count) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    g_mutex_lock(&mutex);
    *count = found ? found->len : 0;
    g_mutex_unlock(&mutex);
    return GC_ERR_SUCCESS;
}

GC_API IFGetDeviceID(GENTL_HANDLE interface, uint32_t index, char *id, size_t *size) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    g_mutex_lock(&mutex);
    guint count = found ? found->len : 0;
    GC_ERROR result = index < count ? answer_string(((Found *)found->pdata[index])->id, NULL, id, size)
                                    : fail(GC_ERR_INVALID_INDEX, "camera number %u asked for, the last search found %u",
                                           index, count);
    g_mutex_unlock(&mutex);
    return result;
}

GC_API IFGetDeviceInfo(GENTL_HANDLE interface, const char *id, int32_t command, INFO_DATATYPE *type, void *out,
                       size_t *size) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    g_mutex_lock(&mutex);
    const Found *camera = found_with(id);
    GC_ERROR result = camera ? found_answer(camera, command, type, out, size) : last_error();
    g_mutex_unlock(&mutex);
    return result;
}

GC_API IFOpenDevice(GENTL_HANDLE interface, const char *id, int32_t access, GENTL_HANDLE *device) {
    if (!module_of(interface, MODULE_INTERFACE)) return last_error();
    if (!device) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    g_mutex_lock(&mutex);
    const Found *camera = found_with(id);
    Found *copy = camera ? found_copy(camera) : NULL;
    g_mutex_unlock(&mutex);
    Device *opened = NULL;
    GC_ERROR result = copy ? device_open(copy, access, &opened) : last_error();
    if (result == GC_ERR_SUCCESS) *device = opened;
    return result;
}
