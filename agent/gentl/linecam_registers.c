/* What the registers hold, and what happens when one is written. */
#define _POSIX_C_SOURCE 200809L
#include "linecam.h"

#include <stdio.h>
#include <string.h>

extern const uint8_t _binary_linecam_xml_start[], _binary_linecam_xml_end[]; /* put there by ld -b binary */

enum { CAPABILITY_WRITE_MEMORY = 1 << 1, CAPABILITY_RESEND = 1 << 2, CAPABILITY_SERIAL = 1 << 30 };
#define CAPABILITY_USER_NAME 0x80000000u
#define PACKET_SIZE_FIRE_TEST 0x80000000u

static size_t xml_bytes(void) { return (size_t)(_binary_linecam_xml_end - _binary_linecam_xml_start); }

uint32_t register_get(const Camera *camera, uint32_t address) { return get32(camera->registers + address); }

void register_set(Camera *camera, uint32_t address, uint32_t value) { put32(camera->registers + address, value); }

double register_get_double(const Camera *camera, uint32_t address) {
    uint64_t bits = get64(camera->registers + address);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void register_set_double(Camera *camera, uint32_t address, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put64(camera->registers + address, bits);
}

static void register_set_text(Camera *camera, uint32_t address, size_t bytes, const char *text) {
    snprintf((char *)camera->registers + address, bytes, "%s", text);
}

size_t image_bytes(const Camera *camera) {
    size_t pixels = (size_t)register_get(camera, REG_WIDTH) * register_get(camera, REG_HEIGHT);
    return (pixels * pixel_bits(register_get(camera, REG_PIXEL_FORMAT)) + 7) / 8;
}

size_t chunk_length(int chunk) {
    static const size_t lengths[CHUNK_COUNT] = {8, 8, 4 * COUNTER_COUNT, 8, 8, 4};
    return lengths[chunk];
}

/* Return the bytes of a frame: the image and, in chunk mode, what is appended to it. */
size_t payload_bytes(const Camera *camera) {
    size_t bytes = image_bytes(camera);
    if (!register_get(camera, REG_CHUNK_MODE)) return bytes;
    bytes += 8; /* each chunk, the image too, is followed by its id and length */
    for (int chunk = 0; chunk < CHUNK_COUNT; chunk++)
        if (register_get(camera, REG_CHUNK_ENABLE + 4 * (uint32_t)chunk)) bytes += chunk_length(chunk) + 8;
    return bytes;
}

static void bootstrap_begin(Camera *camera, const char *serial) {
    uint32_t address = ntohl(camera->address.s_addr);
    char url[128];
    snprintf(url, sizeof url, "Local:linecam.xml;%x;%zx", XML_ADDRESS, xml_bytes());
    register_set(camera, BOOT_VERSION, 0x00020000);     /* GigE Vision 2.0 */
    register_set(camera, BOOT_DEVICE_MODE, 0x80000001); /* big endian, UTF-8 */
    register_set(camera, BOOT_MAC_HIGH, 0x0200);        /* locally administered */
    register_set(camera, BOOT_MAC_LOW, address);
    register_set(camera, BOOT_CURRENT_ADDRESS, address);
    register_set(camera, BOOT_SUBNET_MASK, 0xff000000);
    register_set_text(camera, BOOT_VENDOR, 32, "taktsight");
    register_set_text(camera, BOOT_MODEL, 32, "linecam");
    register_set_text(camera, BOOT_DEVICE_VERSION, 32, "1.0");
    register_set_text(camera, BOOT_VENDOR_INFO, 48, "line simulator, replays pictures");
    register_set_text(camera, BOOT_SERIAL_NUMBER, 16, serial);
    register_set_text(camera, BOOT_XML_URL, 512, url);
    register_set(camera, BOOT_INTERFACE_COUNT, 1);
    register_set(camera, BOOT_STREAM_COUNT, 1);
    register_set(camera, BOOT_CAPABILITY,
                 CAPABILITY_USER_NAME | CAPABILITY_SERIAL | CAPABILITY_WRITE_MEMORY |
                     (camera->resend ? (uint32_t)CAPABILITY_RESEND : 0));
    register_set(camera, BOOT_HEARTBEAT_MS, 3000);
    register_set(camera, BOOT_TICKS_LOW, 1000000000); /* one tick is a nanosecond */
    register_set(camera, BOOT_PACKET_SIZE, 8192);
}

void registers_begin(Camera *camera, const char *serial, const char *pixel_format, uint32_t width, uint32_t height) {
    bootstrap_begin(camera, serial);
    register_set(camera, REG_SENSOR_WIDTH, width);
    register_set(camera, REG_SENSOR_HEIGHT, height);
    register_set(camera, REG_WIDTH, width);
    register_set(camera, REG_HEIGHT, height);
    register_set(camera, REG_PIXEL_FORMAT, pixel_format_named(pixel_format));
    register_set(camera, REG_FRAME_COUNT, 1);
    register_set(camera, REG_LINE_MODE + 4, 1); /* Line1 is an input, Line2 and Line3 are outputs */
    register_set(camera, REG_LINE_MODE + 8, 1);
    register_set(camera, REG_LINE_SOURCE + 4, 1); /* Line2: ExposureActive, Line3: UserOutput0 */
    register_set(camera, REG_LINE_SOURCE + 8, 2);
    register_set_double(camera, REG_EXPOSURE_TIME_US, 100);
    register_set_double(camera, REG_FRAME_RATE_HZ, 20);
    register_set_double(camera, REG_TEMPERATURE, 41.5);
    for (uint32_t colour = 0; colour < 3; colour++) register_set_double(camera, REG_BALANCE_RATIO + 8 * colour, 1);
    for (int set = 0; set < 2; set++)
        memcpy(camera->user_sets[set], camera->registers + SETTINGS_BEGIN, SETTINGS_END - SETTINGS_BEGIN);
}

static void refresh_reported(Camera *camera) {
    register_set(camera, REG_PAYLOAD_SIZE, (uint32_t)payload_bytes(camera));
    register_set(camera, REG_LINE_STATUS_ALL, line_status(camera));
    for (uint32_t i = 0; i < COUNTER_COUNT; i++) register_set(camera, REG_COUNTER_VALUE + 4 * i, camera->counters[i]);
}

/* Copy what a client reads, from the registers or from the description of the camera. */
Status registers_read(Camera *camera, uint32_t address, size_t bytes, uint8_t *out) {
    if (address >= XML_ADDRESS && address - XML_ADDRESS < xml_bytes()) {
        size_t left = xml_bytes() - (address - XML_ADDRESS);
        memset(out, 0, bytes); /* reads are in words of four, the description may end within one */
        memcpy(out, _binary_linecam_xml_start + (address - XML_ADDRESS), bytes < left ? bytes : left);
        return STATUS_SUCCESS;
    }
    if (address >= REGISTER_BYTES || bytes > REGISTER_BYTES - address) return STATUS_INVALID_ADDRESS;
    refresh_reported(camera);
    memcpy(out, camera->registers + address, bytes);
    return STATUS_SUCCESS;
}

static bool region_fits(const Camera *camera) {
    uint32_t width = register_get(camera, REG_WIDTH), height = register_get(camera, REG_HEIGHT);
    return width > 0 && height > 0 &&
           (uint64_t)width + register_get(camera, REG_OFFSET_X) <= register_get(camera, REG_SENSOR_WIDTH) &&
           (uint64_t)height + register_get(camera, REG_OFFSET_Y) <= register_get(camera, REG_SENSOR_HEIGHT);
}

/* Say whether the settings, as they stand after a write, are ones that the camera can obey. */
static bool settings_hold(const Camera *camera) {
    double exposure_us = register_get_double(camera, REG_EXPOSURE_TIME_US);
    double rate_hz = register_get_double(camera, REG_FRAME_RATE_HZ);
    double delay_us = register_get_double(camera, REG_TRIGGER_DELAY_US);
    uint32_t packet_bytes = register_get(camera, BOOT_PACKET_SIZE) & 0xffff;
    return region_fits(camera) && pixel_bits(register_get(camera, REG_PIXEL_FORMAT)) != 0 && exposure_us >= 1 &&
           exposure_us <= 1e7 && rate_hz >= 0.01 && rate_hz <= 10000 && delay_us >= 0 && delay_us <= 1e7 &&
           packet_bytes >= 220 && packet_bytes <= 16384 && register_get(camera, REG_TRIGGER_MODE) <= 1 &&
           register_get(camera, REG_TRIGGER_SOURCE) <= TRIGGER_FROM_LINE1 &&
           register_get(camera, REG_TRIGGER_ACTIVATION) <= EDGE_ANY &&
           register_get(camera, REG_ACQUISITION_MODE) <= MODE_MULTI_FRAME;
}

static bool may_write(uint32_t address, size_t bytes) {
    static const struct {
        uint32_t begin, end;
    } writable[] = {
        {BOOT_USER_NAME,      BOOT_USER_NAME + 16    },
        {BOOT_HEARTBEAT_MS,   BOOT_HEARTBEAT_MS + 4  },
        {BOOT_STREAM_PORT,    BOOT_PACKET_DELAY + 4  },
        {BOOT_STREAM_ADDRESS, BOOT_STREAM_ADDRESS + 4},
        {SETTINGS_BEGIN,      REG_SENSOR_WIDTH       },
        {REG_SELECTORS,       REGISTER_BYTES         }
    };
    for (size_t i = 0; i < sizeof writable / sizeof writable[0]; i++)
        if (address >= writable[i].begin && address + bytes <= writable[i].end) return true;
    return false;
}

static void user_set(Camera *camera, bool save) {
    uint32_t set = register_get(camera, REG_USER_SET_SELECTOR);
    uint8_t *settings = camera->registers + SETTINGS_BEGIN;
    if (set > 1 || (save && set == 0)) return; /* Default cannot be overwritten */
    if (save)
        memcpy(camera->user_sets[set], settings, SETTINGS_END - SETTINGS_BEGIN);
    else
        memcpy(settings, camera->user_sets[set], SETTINGS_END - SETTINGS_BEGIN);
}

/* Be as after power-up: away for a second, with nobody in control and the default settings. */
static void restart(Camera *camera) {
    register_set(camera, REG_USER_SET_SELECTOR, 0);
    user_set(camera, false);
    camera->heard_ns = 0; /* the heartbeat is lost when the loop looks next */
    camera->faults.stalled_until_ns = now_ns() + 1000000000;
}

static void react(Camera *camera, uint32_t address) {
    uint32_t value = register_get(camera, address);
    if (address == REG_ACQUISITION_START) {
        acquisition_start(camera);
    } else if (address == REG_ACQUISITION_STOP) {
        acquisition_stop(camera);
    } else if (address == REG_TRIGGER_SOFTWARE) {
        trigger_software(camera);
    } else if (address == REG_TIMESTAMP_LATCH) {
        put64(camera->registers + REG_TIMESTAMP, (uint64_t)now_ns());
    } else if (address == REG_USER_SET_LOAD || address == REG_USER_SET_SAVE) {
        user_set(camera, address == REG_USER_SET_SAVE);
    } else if (address >= REG_COUNTER_RESET && address < REG_COUNTER_RESET + 4 * COUNTER_COUNT) {
        camera->counters[(address - REG_COUNTER_RESET) / 4] = 0;
    } else if (address == REG_DEVICE_RESET) {
        restart(camera);
    } else if (address == BOOT_PACKET_SIZE && value & PACKET_SIZE_FIRE_TEST) {
        register_set(camera, BOOT_PACKET_SIZE, value & ~PACKET_SIZE_FIRE_TEST);
        stream_send_test_packet(camera);
    } else if (address >= REG_USER_OUTPUT && address < REG_USER_OUTPUT + 8) {
        say(camera, "output %u %u", (address - REG_USER_OUTPUT) / 4, value);
    }
    bool changes_pixels = address >= REG_WIDTH && address <= REG_PIXEL_FORMAT;
    if (changes_pixels || address == REG_USER_SET_LOAD) pictures_forget_rendered(&camera->pictures);
    if (camera->acquiring && (changes_pixels || (address >= REG_CHUNK_MODE && address < REG_EXPOSURE_TIME_US)))
        stream_prepare(camera);
}

/* Write, unless the camera could not obey the settings then; and do what was written. */
Status registers_write(Camera *camera, uint32_t address, size_t bytes, const uint8_t *in) {
    uint8_t before[540];
    if (bytes > sizeof before) return STATUS_INVALID_PARAMETER;
    if (address >= REGISTER_BYTES || bytes > REGISTER_BYTES - address) return STATUS_INVALID_ADDRESS;
    if (!may_write(address, bytes)) return STATUS_WRITE_PROTECT;
    memcpy(before, camera->registers + address, bytes);
    memcpy(camera->registers + address, in, bytes);
    if (!settings_hold(camera)) {
        memcpy(camera->registers + address, before, bytes);
        return STATUS_INVALID_PARAMETER;
    }
    react(camera, address);
    return STATUS_SUCCESS;
}
