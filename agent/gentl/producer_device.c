/* An open camera. */
#include "producer.h"

#include <string.h>

enum { PROBE_MS = 600 };

static GMutex mutex;
static GPtrArray *opened; /* Device*, in this process */

/* Return the open device with this id, or NULL. With the mutex held. */
static Device *open_device(const char *id) {
    for (guint i = 0; opened && i < opened->len; i++)
        if (strcmp(((Device *)opened->pdata[i])->found->id, id) == 0) return opened->pdata[i];
    return NULL;
}

int device_access_status(const char *id) {
    g_mutex_lock(&mutex);
    const Device *device = open_device(id);
    int status = !device             ? DEVICE_ACCESS_STATUS_READWRITE
                 : device->read_only ? DEVICE_ACCESS_STATUS_OPEN_READONLY
                                     : DEVICE_ACCESS_STATUS_OPEN_READWRITE;
    g_mutex_unlock(&mutex);
    return status;
}

/* Return who controls the camera, as far as it tells; to be freed. */
static char *controller_of(ArvDevice *camera) {
    enum { PRIMARY_APPLICATION_ADDRESS = 0x0a14 };
    guint32 address = 0;
    if (!arv_device_read_register(camera, PRIMARY_APPLICATION_ADDRESS, &address, NULL) || address == 0)
        return g_strdup("another program");
    return g_strdup_printf("a program at %u.%u.%u.%u", address >> 24, address >> 16 & 255, address >> 8 & 255,
                           address & 255);
}

/* A camera that another program controls is opened by libaravis all the same, to be read. */
static GC_ERROR check_control(ArvDevice *camera, const Found *found, gint32 access) {
    if (access == DEVICE_ACCESS_READONLY || !ARV_IS_GV_DEVICE(camera)) return GC_ERR_SUCCESS;
    if (arv_gv_device_is_controller(ARV_GV_DEVICE(camera))) return GC_ERR_SUCCESS;
    char *owner = controller_of(camera);
    GC_ERROR result = fail(GC_ERR_ACCESS_DENIED,
                           "camera %s at %s is in use by %s: end it, or wait for its heartbeat to "
                           "time out",
                           found->id, found->address, owner);
    g_free(owner);
    return result;
}

static GC_ERROR open_camera(const Found *found, gint32 access, ArvDevice **camera) {
    if (strcmp(found->tl_type, "GEV") == 0 && !camera_answers(found->address, PROBE_MS, NULL))
        return fail(GC_ERR_TIMEOUT,
                    "camera %s does not answer at %s: check cable and power, then update the device list", found->id,
                    found->address);
    GError *error = NULL;
    *camera = arv_open_device(found->id, &error);
    if (!*camera) return fail_glib(error, GC_ERR_ACCESS_DENIED, "opening the camera");
    GC_ERROR result = check_control(*camera, found, access);
    if (result != GC_ERR_SUCCESS) {
        g_clear_object(camera);
        return result;
    }
    gsize size = 0;
    if (arv_device_get_genicam_xml(*camera, &size) && size > 0) return GC_ERR_SUCCESS;
    g_clear_object(camera);
    return fail(GC_ERR_IO, "camera %s gives no GenICam description", found->id);
}

static GC_ERROR open_if_free(const Found *found, gint32 access, ArvDevice **camera) {
    if (access != DEVICE_ACCESS_READONLY && access != DEVICE_ACCESS_CONTROL && access != DEVICE_ACCESS_EXCLUSIVE)
        return fail(GC_ERR_INVALID_PARAMETER, "access %d asked for, wanted read-only (2), control (3) or exclusive (4)",
                    access);
    g_mutex_lock(&mutex);
    gboolean taken = open_device(found->id) != NULL;
    g_mutex_unlock(&mutex);
    if (taken) return fail(GC_ERR_RESOURCE_IN_USE, "camera %s is open in this process already", found->id);
    return open_camera(found, access, camera);
}

/* Open a camera for control, or to be read. `found` is freed here or with the device. */
GC_ERROR device_open(Found *found, gint32 access, Device **result) {
    ArvDevice *camera = NULL;
    GC_ERROR error = open_if_free(found, access, &camera);
    if (error != GC_ERR_SUCCESS) {
        found_free(found);
        return error;
    }
    Device *device = g_new0(Device, 1);
    device->found = found;
    device->read_only = access == DEVICE_ACCESS_READONLY;
    device->arv = camera;
    device->calls = calls_begin(camera);
    const char *xml = arv_device_get_genicam_xml(camera, &device->xml_size);
    device->xml = g_memdup2(xml, device->xml_size);
    device->port.device = device;
    module_begin(&device->module, MODULE_DEVICE);
    module_begin(&device->port.module, MODULE_PORT);
    g_mutex_lock(&mutex);
    if (!opened) opened = g_ptr_array_new();
    g_ptr_array_add(opened, device);
    g_mutex_unlock(&mutex);
    *result = device;
    return GC_ERR_SUCCESS;
}

GC_API DevClose(GENTL_HANDLE handle) {
    Device *device = module_of(handle, MODULE_DEVICE);
    if (!device) return last_error();
    if (device->stream) stream_close(device->stream);
    module_end(&device->module);
    module_end(&device->port.module);
    g_mutex_lock(&mutex);
    g_ptr_array_remove(opened, device);
    if (opened->len == 0) g_clear_pointer(&opened, g_ptr_array_unref);
    g_mutex_unlock(&mutex);
    calls_end(device->calls);
    found_free(device->found);
    g_free(device->xml);
    g_free(device);
    return GC_ERR_SUCCESS;
}

void devices_close_all(void) {
    for (;;) {
        g_mutex_lock(&mutex);
        Device *device = opened && opened->len > 0 ? opened->pdata[0] : NULL;
        g_mutex_unlock(&mutex);
        if (!device || DevClose(device) != GC_ERR_SUCCESS) return;
    }
}

GC_API DevGetInfo(GENTL_HANDLE handle, int32_t command, INFO_DATATYPE *type, void *out, size_t *size) {
    const Device *device = module_of(handle, MODULE_DEVICE);
    return device ? found_answer(device->found, command, type, out, size) : last_error();
}

GC_API DevGetParentIF(GENTL_HANDLE handle, GENTL_HANDLE *interface) {
    if (!module_of(handle, MODULE_DEVICE)) return last_error();
    if (!interface) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    *interface = interface_handle();
    return GC_ERR_SUCCESS;
}

GC_API DevGetPort(GENTL_HANDLE handle, GENTL_HANDLE *port) {
    Device *device = module_of(handle, MODULE_DEVICE);
    if (!device) return last_error();
    if (!port) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the handle is NULL");
    *port = &device->port;
    return GC_ERR_SUCCESS;
}

GC_API DevGetNumDataStreams(GENTL_HANDLE handle, uint32_t *count) {
    if (!module_of(handle, MODULE_DEVICE)) return last_error();
    if (!count) return fail(GC_ERR_INVALID_PARAMETER, "the pointer to the count is NULL");
    *count = 1;
    return GC_ERR_SUCCESS;
}

GC_API DevGetDataStreamID(GENTL_HANDLE handle, uint32_t index, char *id, size_t *size) {
    if (!module_of(handle, MODULE_DEVICE)) return last_error();
    if (index > 0) return fail(GC_ERR_INVALID_INDEX, "data stream %u asked for, there is one, number 0", index);
    return answer_string(STREAM_ID, NULL, id, size);
}
