/* Which handles are alive: a stale or foreign one gives an error, not a crash. */
#include "producer.h"

static GMutex mutex;
static GHashTable *alive; /* of Module* */

void module_begin(Module *module, ModuleKind kind) {
    module->kind = kind;
    g_mutex_lock(&mutex);
    if (!alive) alive = g_hash_table_new(NULL, NULL);
    g_hash_table_add(alive, module);
    g_mutex_unlock(&mutex);
}

void module_end(Module *module) {
    g_mutex_lock(&mutex);
    if (alive) g_hash_table_remove(alive, module);
    if (alive && g_hash_table_size(alive) == 0) g_clear_pointer(&alive, g_hash_table_unref);
    g_mutex_unlock(&mutex);
}

/* Find out what a handle is. */
GC_ERROR module_kind(GENTL_HANDLE handle, ModuleKind *kind) {
    if (!library_is_initialised())
        return fail(GC_ERR_NOT_INITIALIZED, "the library is not initialised: call GCInitLib");
    g_mutex_lock(&mutex);
    gboolean known = handle && alive && g_hash_table_contains(alive, handle);
    if (known) *kind = ((Module *)handle)->kind;
    g_mutex_unlock(&mutex);
    if (known) return GC_ERR_SUCCESS;
    if (!handle) return fail(GC_ERR_INVALID_HANDLE, "the handle is NULL");
    return fail(GC_ERR_INVALID_HANDLE, "the handle %p is closed, or none of this producer", handle);
}

/* Return what the handle points to if it is of this kind; else say the error and return NULL. */
void *module_of(GENTL_HANDLE handle, ModuleKind kind) {
    static const char *const names[] = {"",       "a system",      "an interface", "a device",
                                        "a port", "a data stream", "a buffer",     "an event"};
    ModuleKind found;
    if (module_kind(handle, &found) != GC_ERR_SUCCESS) return NULL;
    if (found == kind) return handle;
    fail(GC_ERR_INVALID_HANDLE, "the handle is %s, wanted %s", names[found], names[kind]);
    return NULL;
}
