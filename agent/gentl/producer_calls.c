/* Calls to a camera that may be dead.
 *
 * libaravis waits three seconds and more for a camera that does not answer, with no way to wait less. So each camera
 * has a thread that makes the calls. Whoever wants one waits for it; when it takes long, the camera is asked, in
 * another way, whether it is alive. If not, the caller is told at once, and so is everyone who comes before libaravis
 * gives up. A camera that is slow but alive is waited for.
 */
#include "producer.h"

#include <string.h>

#define PATIENCE_US 300000      /* after so long the camera is asked whether it is alive */
#define PROBE_MS 200            /* how long its answer may take */
#define LONGEST_CALL_US 8000000 /* flash memory may take seconds to write */
#define LONGEST_CLOSE_US 500000

typedef struct {
    CallKind kind;
    guint64 address;
    guint8 *data; /* of our own: the caller may be gone when the call ends */
    gsize bytes;
    ArvStreamCallback callback;
    void *user;
    ArvStream *stream;
    gboolean done, abandoned, ok;
    GError *error;
} Call;

struct Calls {
    gatomicrefcount references; /* one of the owner, one of the thread */
    GMutex mutex;
    GCond changed;
    ArvDevice *camera;
    GPtrArray *released; /* streams to be freed, which may talk to the camera */
    char *address;       /* NULL: not on a network */
    Call *current;       /* asked for, or being made */
    gint64 asked_us;
    gboolean closing, closed;
};

static void free_call(Call *call) {
    g_free(call->data);
    g_clear_object(&call->stream);
    g_clear_error(&call->error);
    g_free(call);
}

static void unref_calls(Calls *calls) {
    if (!g_atomic_ref_count_dec(&calls->references)) return;
    g_mutex_clear(&calls->mutex);
    g_cond_clear(&calls->changed);
    g_ptr_array_unref(calls->released);
    g_free(calls->address);
    g_free(calls);
}

static void make(Calls *calls, Call *call) {
    switch (call->kind) {
        case CALL_READ:
            call->ok =
                arv_device_read_memory(calls->camera, call->address, (guint32)call->bytes, call->data, &call->error);
            break;
        case CALL_WRITE:
            call->ok =
                arv_device_write_memory(calls->camera, call->address, (guint32)call->bytes, call->data, &call->error);
            break;
        case CALL_CREATE_STREAM:
            call->stream = arv_device_create_stream(calls->camera, call->callback, call->user, &call->error);
            call->ok = call->stream != NULL;
            break;
    }
}

/* Make the current call. With the mutex held, which is free while the call lasts. */
static void make_current(Calls *calls) {
    Call *call = calls->current;
    g_mutex_unlock(&calls->mutex);
    make(calls, call);
    g_mutex_lock(&calls->mutex);
    call->done = TRUE;
    if (call->abandoned) {
        free_call(call);
        calls->current = NULL;
    }
    g_cond_broadcast(&calls->changed);
}

static void free_released(Calls *calls) {
    GPtrArray *released = calls->released;
    calls->released = g_ptr_array_new_with_free_func(g_object_unref);
    g_mutex_unlock(&calls->mutex);
    g_ptr_array_unref(released);
    g_mutex_lock(&calls->mutex);
}

static gpointer run(gpointer pointer) {
    Calls *calls = pointer;
    g_mutex_lock(&calls->mutex);
    for (;;) {
        gboolean wanted = calls->current && !calls->current->done;
        if (calls->released->len > 0)
            free_released(calls);
        else if (wanted)
            make_current(calls);
        else if (calls->closing)
            break;
        else
            g_cond_wait(&calls->changed, &calls->mutex);
    }
    g_mutex_unlock(&calls->mutex);
    g_clear_object(&calls->camera); /* says goodbye to the camera */
    g_mutex_lock(&calls->mutex);
    calls->closed = TRUE;
    g_cond_broadcast(&calls->changed);
    g_mutex_unlock(&calls->mutex);
    unref_calls(calls);
    return NULL;
}

/* Take over an open camera. */
Calls *calls_begin(ArvDevice *camera) {
    Calls *calls = g_new0(Calls, 1);
    g_atomic_ref_count_init(&calls->references);
    g_atomic_ref_count_inc(&calls->references);
    g_mutex_init(&calls->mutex);
    g_cond_init(&calls->changed);
    calls->camera = camera;
    calls->released = g_ptr_array_new_with_free_func(g_object_unref);
    if (ARV_IS_GV_DEVICE(camera)) {
        GInetSocketAddress *address = G_INET_SOCKET_ADDRESS(arv_gv_device_get_device_address(ARV_GV_DEVICE(camera)));
        calls->address = g_inet_address_to_string(g_inet_socket_address_get_address(address));
    }
    g_thread_unref(g_thread_new("taktsight-calls", run, calls));
    return calls;
}

/* Return whether a GigE Vision camera answers a discovery request, which every one does to everybody.
 * answer: DISCOVERY_BYTES that say what it is, or NULL.
 */
gboolean camera_answers(const char *address, guint timeout_ms, guint8 *answer) {
    static const guint8 discovery[] = {0x42, 0x01, 0x00, 0x02, 0x00, 0x00, 0x00, 0x01};
    enum { HEADER_BYTES = 8, TRIES = 2 }; /* a packet may get lost */
    gboolean answered = FALSE;
    GSocketAddress *camera = g_inet_socket_address_new_from_string(address, 3956);
    GSocket *socket = g_socket_new(G_SOCKET_FAMILY_IPV4, G_SOCKET_TYPE_DATAGRAM, G_SOCKET_PROTOCOL_UDP, NULL);
    for (guint i = 0; camera && socket && !answered && i < TRIES; i++) {
        guint8 reply[HEADER_BYTES + DISCOVERY_BYTES] = {0};
        gint64 wait_us = (gint64)timeout_ms * 1000 / TRIES;
        g_socket_send_to(socket, camera, (const char *)discovery, sizeof discovery, NULL, NULL);
        if (!g_socket_condition_timed_wait(socket, G_IO_IN, wait_us, NULL, NULL)) continue;
        answered = g_socket_receive(socket, (char *)reply, sizeof reply, NULL, NULL) >= HEADER_BYTES;
        if (answer) memcpy(answer, reply + HEADER_BYTES, DISCOVERY_BYTES);
    }
    g_clear_object(&socket);
    g_clear_object(&camera);
    return answered;
}

static GC_ERROR fail_silent(const Calls *calls) {
    return fail(GC_ERR_TIMEOUT,
                "the camera%s%s has not answered for %.1f s: check cable and power; close it, and open it "
                "again when it is back",
                calls->address ? " at " : "", calls->address ? calls->address : "",
                (double)(g_get_monotonic_time() - calls->asked_us) / 1e6);
}

/* Wait until the call is done, or it is clear that the camera is gone. With the mutex held. */
static gboolean wait_for(Calls *calls, Call *call) {
    gint64 last_us = calls->asked_us + LONGEST_CALL_US;
    while (!call->done) {
        if (g_cond_wait_until(&calls->changed, &calls->mutex, g_get_monotonic_time() + PATIENCE_US)) continue;
        if (call->done) break;
        g_mutex_unlock(&calls->mutex);
        gboolean alive = calls->address ? camera_answers(calls->address, PROBE_MS, NULL) : TRUE;
        g_mutex_lock(&calls->mutex);
        if (!call->done && (!alive || g_get_monotonic_time() > last_us)) return FALSE;
    }
    return TRUE;
}

/* Make a call, which is freed here or by the thread. On success `take` has what is wanted out of it. */
static GC_ERROR carry_out(Calls *calls, Call *call, const char *doing, void (*take)(Call *call, void *out), void *out) {
    g_mutex_lock(&calls->mutex);
    while (calls->current && !calls->current->abandoned) g_cond_wait(&calls->changed, &calls->mutex);
    GC_ERROR result;
    if (calls->current) { /* nobody waits for it any more, the camera does not answer */
        result = fail_silent(calls);
        free_call(call);
        g_mutex_unlock(&calls->mutex);
        return result;
    }
    calls->current = call;
    calls->asked_us = g_get_monotonic_time();
    g_cond_broadcast(&calls->changed);
    if (wait_for(calls, call)) {
        result = call->ok ? GC_ERR_SUCCESS : fail_glib(g_steal_pointer(&call->error), GC_ERR_IO, doing);
        if (call->ok && take) take(call, out);
        calls->current = NULL;
        free_call(call);
    } else {
        call->abandoned = TRUE;
        result = fail_silent(calls);
    }
    g_cond_broadcast(&calls->changed);
    g_mutex_unlock(&calls->mutex);
    return result;
}

static void take_data(Call *call, void *out) { memcpy(out, call->data, call->bytes); }

static void take_stream(Call *call, void *out) { *(ArvStream **)out = g_steal_pointer(&call->stream); }

GC_ERROR calls_read(Calls *calls, guint64 address, void *out, gsize bytes) {
    Call *call = g_new0(Call, 1);
    *call = (Call){.kind = CALL_READ, .address = address, .data = g_malloc0(bytes), .bytes = bytes};
    return carry_out(calls, call, "reading the camera's registers", take_data, out);
}

GC_ERROR calls_write(Calls *calls, guint64 address, const void *in, gsize bytes) {
    Call *call = g_new0(Call, 1);
    *call = (Call){.kind = CALL_WRITE, .address = address, .data = g_memdup2(in, bytes), .bytes = bytes};
    return carry_out(calls, call, "writing the camera's registers", NULL, NULL);
}

/* After a failure the callback may still be called, from a stream that nobody has, though never with a buffer. */
GC_ERROR calls_create_stream(Calls *calls, ArvStreamCallback callback, void *user, ArvStream **stream) {
    Call *call = g_new0(Call, 1);
    *call = (Call){.kind = CALL_CREATE_STREAM, .callback = callback, .user = user};
    return carry_out(calls, call, "opening the data stream", take_stream, stream);
}

/* Give a stream back. */
void calls_release_stream(Calls *calls, ArvStream *stream) {
    g_mutex_lock(&calls->mutex);
    g_ptr_array_add(calls->released, stream);
    g_cond_broadcast(&calls->changed);
    g_mutex_unlock(&calls->mutex);
}

/* Close the camera. One that does not answer is closed in the background, which takes libaravis some seconds. */
void calls_end(Calls *calls) {
    gint64 end_us = g_get_monotonic_time() + LONGEST_CLOSE_US;
    g_mutex_lock(&calls->mutex);
    calls->closing = TRUE;
    g_cond_broadcast(&calls->changed);
    while (!calls->closed && g_cond_wait_until(&calls->changed, &calls->mutex, end_us)) continue;
    g_mutex_unlock(&calls->mutex);
    unref_calls(calls);
}
