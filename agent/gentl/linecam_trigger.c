/* From an edge, a software trigger or the clock to an exposure, and from the end of the exposure to a frame. */
#define _POSIX_C_SOURCE 200809L
#include "linecam.h"

#include <string.h>

#define FREE_RUN_TOP_HZ 30.0 /* where AcquisitionFrameRateEnable is off */

enum { LINES = 3 };
enum { SOURCE_OFF, SOURCE_EXPOSURE_ACTIVE, SOURCE_USER_OUTPUT0, SOURCE_USER_OUTPUT1 };

static bool triggered_mode(const Camera *camera) { return register_get(camera, REG_TRIGGER_MODE) == 1; }

static bool inverted(const Camera *camera, uint32_t line) {
    return register_get(camera, REG_LINE_INVERTER + 4 * (line - 1)) != 0;
}

/* Return the level of each line in the bit of its number, as LineStatusAll. */
uint32_t line_status(const Camera *camera) {
    uint32_t status = camera->line_high != inverted(camera, 1) ? 1u << 1 : 0;
    for (uint32_t line = 2; line <= LINES; line++) {
        uint32_t source = register_get(camera, REG_LINE_SOURCE + 4 * (line - 1));
        bool high = (source == SOURCE_EXPOSURE_ACTIVE && camera->exposing) ||
                    (source == SOURCE_USER_OUTPUT0 && register_get(camera, REG_USER_OUTPUT)) ||
                    (source == SOURCE_USER_OUTPUT1 && register_get(camera, REG_USER_OUTPUT + 4));
        if (high != inverted(camera, line)) status |= 1u << line;
    }
    return status;
}

static void begin_exposure(Camera *camera, int64_t start_ns) {
    camera->exposing = true;
    camera->exposed_ns = start_ns;
    camera->frame_due_ns = start_ns + (int64_t)(register_get_double(camera, REG_EXPOSURE_TIME_US) * 1000);
    memcpy(camera->exposure_counters, camera->counters, sizeof camera->counters);
}

/* A trigger while the camera exposes, or while it is not acquiring, is missed, and counted. */
static void expose(Camera *camera) {
    camera->counters[COUNTER_TRIGGERS]++;
    if (!camera->acquiring || camera->exposing) {
        camera->counters[COUNTER_MISSED]++;
        say(camera, "trigger %u missed", camera->counters[COUNTER_TRIGGERS]);
        return;
    }
    begin_exposure(camera, now_ns() + (int64_t)(register_get_double(camera, REG_TRIGGER_DELAY_US) * 1000));
}

void trigger_software(Camera *camera) {
    if (triggered_mode(camera) && register_get(camera, REG_TRIGGER_SOURCE) == TRIGGER_FROM_SOFTWARE) expose(camera);
}

/* Set the level of Line1. An edge sooner than LineDebouncerTime after the last is bouncing, and does not count. */
void trigger_line(Camera *camera, bool high) {
    bool before = camera->line_high != inverted(camera, 1);
    camera->line_high = high;
    bool after = high != inverted(camera, 1);
    int64_t debounce_ns = (int64_t)(register_get_double(camera, REG_DEBOUNCE_US) * 1000), now = now_ns();
    if (before == after || now - camera->line_edge_ns < debounce_ns) return;
    camera->line_edge_ns = now;
    if (after) camera->counters[COUNTER_LINE1]++;
    uint32_t activation = register_get(camera, REG_TRIGGER_ACTIVATION);
    bool wanted = activation == EDGE_ANY || (activation == EDGE_RISING) == after;
    if (wanted && triggered_mode(camera) && register_get(camera, REG_TRIGGER_SOURCE) == TRIGGER_FROM_LINE1)
        expose(camera);
}

void acquisition_start(Camera *camera) {
    if (camera->acquiring || !register_get(camera, BOOT_STREAM_PORT)) return;
    camera->acquiring = true;
    camera->frame_id = 0;
    stream_prepare(camera);
    if (!triggered_mode(camera)) begin_exposure(camera, now_ns());
}

void acquisition_stop(Camera *camera) {
    camera->acquiring = camera->exposing = false;
    camera->frame_due_ns = 0;
    camera->unsent = 0;
}

static bool was_the_last(const Camera *camera) {
    uint32_t mode = register_get(camera, REG_ACQUISITION_MODE);
    return (mode == MODE_SINGLE_FRAME && camera->frame_id >= 1) ||
           (mode == MODE_MULTI_FRAME && camera->frame_id >= register_get(camera, REG_FRAME_COUNT));
}

/* Send the frame if its exposure has ended. */
void trigger_expose_when_due(Camera *camera) {
    if (!camera->exposing || now_ns() < camera->frame_due_ns) return;
    int64_t exposed_ns = camera->exposed_ns;
    camera->exposing = false;
    camera->frame_due_ns = 0;
    camera->frame_id++;
    stream_send_frame(camera, exposed_ns);
    camera->pictures.next++;
    if (was_the_last(camera)) {
        acquisition_stop(camera);
        return;
    }
    stream_prepare(camera);
    if (triggered_mode(camera)) return;
    bool limited = register_get(camera, REG_FRAME_RATE_ENABLE) != 0;
    double rate_hz = limited ? register_get_double(camera, REG_FRAME_RATE_HZ) : FREE_RUN_TOP_HZ;
    int64_t next_ns = exposed_ns + (int64_t)(1e9 / rate_hz), now = now_ns();
    begin_exposure(camera, next_ns > now ? next_ns : now);
}
