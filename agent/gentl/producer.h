/* taktsight.cti: a GenTL 1.5 producer for GigE Vision and USB3 Vision cameras, over libaravis.
 *
 *   producer_error.c      the last error of each thread; answers to queries
 *   producer_module.c     which handles are alive
 *   producer_system.c     the library and the system: one interface, which stands for all networks
 *   producer_interface.c  which cameras there are; opening one
 *   producer_device.c     an open camera
 *   producer_calls.c      calls to a camera that may be dead: each ends within a known time
 *   producer_port.c       registers and the XML description
 *   producer_stream.c     the data stream: acquisition, the way of the buffers
 *   producer_buffer.c     announcing buffers, and what is in them
 *   producer_event.c      waiting for the next filled buffer
 *   producer_later.c      what GenTL 1.6 and 1.7 add, which is not implemented
 *
 * Errors are returned as GenTL codes; what was found, wanted and can be done stands in GCGetLastError.
 */
#ifndef PRODUCER_H
#define PRODUCER_H

#include "gentl.h"

#include <arv.h>

#define PRODUCER_VENDOR "taktsight"
#define PRODUCER_MODEL "taktsight GenTL producer"
#define PRODUCER_VERSION "1.0"
#define INTERFACE_ID "taktsight-network"
#define STREAM_ID "stream0"

typedef enum {
    MODULE_SYSTEM = 1,
    MODULE_INTERFACE,
    MODULE_DEVICE,
    MODULE_PORT,
    MODULE_STREAM,
    MODULE_BUFFER,
    MODULE_EVENT,
} ModuleKind;

/* First member of everything that a handle points to */
typedef struct {
    ModuleKind kind;
} Module;

typedef struct Device Device;
typedef struct Stream Stream;

/* Where a buffer is. Its memory belongs to the client unless it is QUEUED or FILLED. */
typedef enum { BUFFER_IDLE, BUFFER_QUEUED, BUFFER_FILLED } BufferState;

typedef struct {
    Module module;
    Stream *stream;
    ArvBuffer *arv;
    void *memory;
    gsize size;
    gboolean owns_memory;
    void *user;
    BufferState state;
    gboolean new_data; /* filled, and not queued again since */
} Buffer;

/* The event "a buffer was filled" of a stream */
typedef struct {
    Module module;
    Stream *stream;
    guint kills;   /* each ends one wait */
    guint waiting; /* threads inside EventGetData */
    guint64 fired;
} NewBufferEvent;

struct Stream {
    Module module;
    Device *device;
    ArvStream *arv;
    GMutex control; /* held while acquisition starts, stops or is flushed; taken before `mutex` */
    GMutex mutex;   /* of everything below */
    GCond changed;
    gboolean running;
    gboolean fed;       /* libaravis holds the QUEUED buffers */
    GPtrArray *buffers; /* Buffer*, as announced */
    GQueue filled;      /* Buffer*, oldest first */
    guint64 started, delivered, underruns_before;
    NewBufferEvent *event;
};

/* The registers of the camera itself, as opposed to those of the producer's modules */
typedef struct {
    Module module;
    Device *device;
} Port;

typedef struct Calls Calls;

/* One camera of the last search */
typedef struct {
    char *id, *vendor, *model, *serial, *address, *tl_type;
} Found;

struct Device {
    Module module;
    Found *found;
    gboolean read_only;
    ArvDevice *arv;
    char *xml;
    gsize xml_size;
    Calls *calls;
    Port port;
    Stream *stream; /* NULL: not open */
};

/* producer_error.c */
GC_ERROR fail(GC_ERROR code, const char *format, ...) G_GNUC_PRINTF(2, 3);
GC_ERROR last_error(void);
GC_ERROR fail_glib(GError *error, GC_ERROR otherwise, const char *doing);
GC_ERROR answer(INFO_DATATYPE kind, const void *value, gsize bytes, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_string(const char *text, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_int32(gint32 value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_uint32(guint32 value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_uint64(guint64 value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_size(gsize value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_bool(gboolean value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR answer_pointer(void *value, INFO_DATATYPE *type, void *out, size_t *size);
GC_ERROR not_available(const char *module, gint32 command);

/* producer_module.c */
void module_begin(Module *module, ModuleKind kind);
void module_end(Module *module);
gboolean library_is_initialised(void);
void *module_of(GENTL_HANDLE handle, ModuleKind kind); /* NULL, with the error said, if it is not one */
GC_ERROR module_kind(GENTL_HANDLE handle, ModuleKind *kind);

/* producer_interface.c */
GC_ERROR found_answer(const Found *found, gint32 command, INFO_DATATYPE *type, void *out, size_t *size);
void found_free(gpointer found);
void found_clear(void);
GENTL_HANDLE interface_handle(void);
GENTL_HANDLE system_handle(void);

/* producer_device.c */
int device_access_status(const char *id);
GC_ERROR device_open(Found *found, gint32 access, Device **device); /* takes `found` */
void devices_close_all(void);

/* producer_calls.c */
typedef enum { CALL_READ, CALL_WRITE, CALL_CREATE_STREAM } CallKind;
Calls *calls_begin(ArvDevice *camera);
GC_ERROR calls_read(Calls *calls, guint64 address, void *out, gsize bytes);
GC_ERROR calls_write(Calls *calls, guint64 address, const void *in, gsize bytes);
GC_ERROR calls_create_stream(Calls *calls, ArvStreamCallback callback, void *user, ArvStream **stream);
void calls_release_stream(Calls *calls, ArvStream *stream);
void calls_end(Calls *calls); /* closes the camera, in the background if it does not answer */
enum { DISCOVERY_BYTES = 248 };
gboolean camera_answers(const char *address, guint timeout_ms, guint8 *answer);

/* producer_stream.c */
GC_ERROR stream_close(Stream *stream);
void buffer_to_input(Buffer *buffer); /* with the stream's mutex */

#endif
