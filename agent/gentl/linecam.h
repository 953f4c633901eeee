/* linecam: a GigE Vision camera without a sensor. It replays a folder of pictures over the network, obeys software and
 * line triggers, and fails in the ways that real cameras do. One process is one camera; one thread does everything.
 *
 *   linecam.c            options, sockets, the loop that waits and acts
 *   linecam_control.c    GVCP: discovery, registers, who is the controller
 *   linecam_registers.c  what the registers mean; linecam.xml tells the same to clients
 *   linecam_trigger.c    triggers, exposures, counters, lines
 *   linecam_stream.c     GVSP: one frame becomes packets, some of them lost, some sent again
 *   linecam_pictures.c   reads PGM and PPM, turns them into pixels of the chosen format
 *   linecam_commands.c   the words that stdin and the command port understand
 *
 * Source of all numbers on the wire: GigE Vision 2.0, GenICam PFNC and SFNC.
 */
#ifndef LINECAM_H
#define LINECAM_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Registers that every GigE Vision device has ("bootstrap registers") */
enum {
    BOOT_VERSION = 0x0000,
    BOOT_DEVICE_MODE = 0x0004,
    BOOT_MAC_HIGH = 0x0008,
    BOOT_MAC_LOW = 0x000c,
    BOOT_CURRENT_ADDRESS = 0x0024,
    BOOT_SUBNET_MASK = 0x0034,
    BOOT_VENDOR = 0x0048,
    BOOT_MODEL = 0x0068,
    BOOT_DEVICE_VERSION = 0x0088,
    BOOT_VENDOR_INFO = 0x00a8,
    BOOT_SERIAL_NUMBER = 0x00d8,
    BOOT_USER_NAME = 0x00e8,
    BOOT_DISCOVERY_BYTES = 0x00f8,
    BOOT_XML_URL = 0x0200,
    BOOT_INTERFACE_COUNT = 0x0600,
    BOOT_STREAM_COUNT = 0x0904,
    BOOT_CAPABILITY = 0x0934,
    BOOT_HEARTBEAT_MS = 0x0938,
    BOOT_TICKS_HIGH = 0x093c,
    BOOT_TICKS_LOW = 0x0940,
    BOOT_CONTROLLER_PORT = 0x0a04,
    BOOT_PRIVILEGE = 0x0a00,
    BOOT_CONTROLLER_ADDRESS = 0x0a14,
    BOOT_STREAM_PORT = 0x0d00,
    BOOT_PACKET_SIZE = 0x0d04,
    BOOT_PACKET_DELAY = 0x0d08,
    BOOT_STREAM_ADDRESS = 0x0d18,
    BOOT_STREAM_SOURCE_PORT = 0x0d1c,
};

/* Our own registers. Settings, which a user set keeps, come first; then commands; then what the camera reports */
enum {
    SETTINGS_BEGIN = 0x10000,
    REG_WIDTH = 0x10000,
    REG_HEIGHT = 0x10004,
    REG_OFFSET_X = 0x10008,
    REG_OFFSET_Y = 0x1000c,
    REG_PIXEL_FORMAT = 0x10010,
    REG_ACQUISITION_MODE = 0x10014,
    REG_FRAME_COUNT = 0x10018,
    REG_FRAME_RATE_ENABLE = 0x1001c,
    REG_TRIGGER_MODE = 0x10020,
    REG_TRIGGER_SOURCE = 0x10024,
    REG_TRIGGER_ACTIVATION = 0x10028,
    REG_EXPOSURE_AUTO = 0x1002c,
    REG_GAIN_AUTO = 0x10030,
    REG_BALANCE_WHITE_AUTO = 0x10034,
    REG_CHUNK_MODE = 0x10038,
    REG_CHUNK_ENABLE = 0x10040,     /* one word per chunk, see CHUNK_COUNT */
    REG_EXPOSURE_TIME_US = 0x10080, /* doubles from here on */
    REG_GAIN_DB = 0x10088,
    REG_FRAME_RATE_HZ = 0x10090,
    REG_TRIGGER_DELAY_US = 0x10098,
    REG_BLACK_LEVEL = 0x100a0,
    REG_DEBOUNCE_US = 0x100a8,
    REG_BALANCE_RATIO = 0x100b0, /* red, green, blue */
    REG_LINE_MODE = 0x10100,     /* one word per line 1..3 */
    REG_LINE_INVERTER = 0x10110,
    REG_LINE_SOURCE = 0x10120,
    REG_USER_OUTPUT = 0x10130, /* one word per output 0..1 */
    SETTINGS_END = 0x10200,

    REG_ACQUISITION_START = 0x10300,
    REG_ACQUISITION_STOP = 0x10304,
    REG_TRIGGER_SOFTWARE = 0x10308,
    REG_DEVICE_RESET = 0x1030c,
    REG_TIMESTAMP_LATCH = 0x10310,
    REG_USER_SET_LOAD = 0x10314,
    REG_USER_SET_SAVE = 0x10318,
    REG_COUNTER_RESET = 0x10320, /* one word per counter */

    REG_SENSOR_WIDTH = 0x10400,
    REG_SENSOR_HEIGHT = 0x10404,
    REG_PAYLOAD_SIZE = 0x10408,
    REG_LINE_STATUS_ALL = 0x1040c,
    REG_COUNTER_VALUE = 0x10410, /* one word per counter */
    REG_TIMESTAMP = 0x10420,     /* 8 bytes, latched */
    REG_TEMPERATURE = 0x10428,   /* double */

    REG_SELECTORS = 0x10500, /* sixteen words, free for linecam.xml to use */
    REG_USER_SET_SELECTOR = 0x10500,
    REGISTER_BYTES = 0x10540,
    XML_ADDRESS = 0x20000,
};

enum { TRIGGER_FROM_SOFTWARE, TRIGGER_FROM_LINE1 };
enum { EDGE_RISING, EDGE_FALLING, EDGE_ANY };
enum { MODE_CONTINUOUS, MODE_SINGLE_FRAME, MODE_MULTI_FRAME };
enum { COUNTER_TRIGGERS, COUNTER_LINE1, COUNTER_MISSED, COUNTER_COUNT };
enum {
    CHUNK_TIMESTAMP,
    CHUNK_FRAME_ID,
    CHUNK_COUNTERS,
    CHUNK_EXPOSURE_TIME,
    CHUNK_GAIN,
    CHUNK_LINE_STATUS,
    CHUNK_COUNT
};

/* What a GVCP command is answered with */
typedef enum {
    STATUS_SUCCESS = 0x0000,
    STATUS_NOT_IMPLEMENTED = 0x8001,
    STATUS_INVALID_PARAMETER = 0x8002,
    STATUS_INVALID_ADDRESS = 0x8003,
    STATUS_WRITE_PROTECT = 0x8004,
    STATUS_ACCESS_DENIED = 0x8006,
    STATUS_PACKET_UNAVAILABLE = 0x800c,
} Status;

typedef struct {
    char **paths;
    size_t count;
    size_t next;        /* index of the picture that the next exposure shows */
    uint8_t **rendered; /* per path, pixels in the current format, or NULL */
    size_t rendered_bytes;
} Pictures;

/* A frame that was sent, kept for requests to send parts of it again */
typedef struct {
    uint16_t block_id;
    uint32_t packet_bytes; /* payload bytes per packet */
    size_t bytes;
    size_t capacity;
    uint8_t *payload;
    uint8_t leader[36];
    uint8_t trailer[16];
    size_t trailer_bytes;
} SentFrame;

enum { SENT_FRAMES = 4 };

/* What goes wrong, by option or command */
typedef struct {
    double lost_per_mille;
    uint64_t random_state;
    unsigned drop_next; /* frames to swallow whole */
    uint16_t *drop_ids; /* frame ids to swallow whole, ended by 0 */
    uint16_t *late_ids; /* frame ids that leave late_ns late, and hold up those behind them; ended by 0 */
    int64_t late_ns, held_until_ns;
    int64_t stalled_until_ns;
} Faults;

typedef struct {
    struct in_addr address;
    int control, broadcast, subnet, stream, command;
    struct sockaddr_in controller; /* sin_port 0: nobody */
    int64_t heard_ns;              /* of the controller */
    struct sockaddr_in last_sender;
    uint16_t last_request;
    uint8_t last_reply[32];
    size_t last_reply_bytes;

    uint8_t registers[REGISTER_BYTES];
    uint8_t user_sets[2][SETTINGS_END - SETTINGS_BEGIN]; /* Default, UserSet1 */

    bool acquiring, exposing;
    int64_t frame_due_ns; /* when the exposure that goes on, or the next of a free run, ends; 0: none */
    int64_t exposed_ns;   /* start of that exposure */
    int64_t line_edge_ns; /* last edge of Line1 that counted */
    bool line_high;
    uint32_t counters[COUNTER_COUNT];
    uint64_t frame_id; /* of the last exposure since AcquisitionStart */
    uint32_t exposure_counters[COUNTER_COUNT];

    Pictures pictures;
    SentFrame sent[SENT_FRAMES];
    size_t sent_next;
    unsigned unsent; /* frames before sent_next that wait to leave */
    bool resend;
    double link_mbit; /* speed of the wire in Mbit/s; 0: no limit */
    Faults faults;
    bool verbose;
} Camera;

/* linecam.c */
int64_t now_ns(void); /* monotonic */
void say(const Camera *camera, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* linecam_registers.c */
void registers_begin(Camera *camera, const char *serial, const char *pixel_format, uint32_t width, uint32_t height);
uint32_t register_get(const Camera *camera, uint32_t address);
void register_set(Camera *camera, uint32_t address, uint32_t value);
double register_get_double(const Camera *camera, uint32_t address);
Status registers_read(Camera *camera, uint32_t address, size_t bytes, uint8_t *out);
Status registers_write(Camera *camera, uint32_t address, size_t bytes, const uint8_t *in);
size_t image_bytes(const Camera *camera);
size_t payload_bytes(const Camera *camera);
size_t chunk_length(int chunk);

/* linecam_control.c */
void control_answer(Camera *camera, int socket);
void control_check_heartbeat(Camera *camera);

/* linecam_trigger.c */
void acquisition_start(Camera *camera);
void acquisition_stop(Camera *camera);
void trigger_software(Camera *camera);
void trigger_line(Camera *camera, bool high);
void trigger_expose_when_due(Camera *camera);
uint32_t line_status(const Camera *camera);

/* linecam_stream.c */
void stream_prepare(Camera *camera);
void stream_send_frame(Camera *camera, int64_t exposed_ns);
void stream_send_waiting(Camera *camera);
void stream_send_test_packet(Camera *camera);
void stream_send_again(Camera *camera, uint16_t block_id, uint32_t first, uint32_t last);

/* linecam_pictures.c */
bool pictures_find(Pictures *pictures, const char *folder_or_list, uint32_t *width, uint32_t *height);
void pictures_forget_rendered(Pictures *pictures);
void pictures_render_next(Camera *camera, uint8_t *out);
unsigned pixel_bits(uint32_t pixel_format); /* 0: unknown format */
uint32_t pixel_format_named(const char *name);

/* linecam_commands.c */
void command_obey(Camera *camera, char *line, char *reply, size_t reply_bytes);

/* Numbers travel most significant byte first */
static inline void put16(uint8_t *out, uint32_t value) {
    out[0] = (uint8_t)(value >> 8);
    out[1] = (uint8_t)value;
}
static inline void put32(uint8_t *out, uint32_t value) {
    put16(out, value >> 16);
    put16(out + 2, value & 0xffff);
}
static inline void put64(uint8_t *out, uint64_t value) {
    put32(out, (uint32_t)(value >> 32));
    put32(out + 4, (uint32_t)value);
}
static inline uint32_t get16(const uint8_t *in) { return (uint32_t)in[0] << 8 | in[1]; }
static inline uint32_t get32(const uint8_t *in) { return get16(in) << 16 | get16(in + 2); }
static inline uint64_t get64(const uint8_t *in) { return (uint64_t)get32(in) << 32 | get32(in + 4); }

#endif
