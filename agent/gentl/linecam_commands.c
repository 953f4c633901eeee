/* What happens at a line, said in words: one line of text, from stdin or in a datagram to the command port. */
#define _POSIX_C_SOURCE 200809L
#include "linecam.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char help[] =
    "line                a pulse on Line1\n"
    "line high | low     the level of Line1\n"
    "lose PER_MILLE      lose this share of the packets\n"
    "drop COUNT          swallow the next frames whole; their ids are used up\n"
    "id NUMBER           the next exposure has this frame id; after 65535 comes 1\n"
    "stall SECONDS       do nothing at all for so long\n"
    "size WIDTH HEIGHT   change the region, as somebody else's program would\n"
    "format NAME         change the pixel format\n"
    "release             forget the controller\n"
    "rewind              the next exposure shows the first picture\n"
    "status              what the camera has done\n"
    "die                 end at once, without a word to the controller";

static bool obey_line(Camera *camera, const char *level) {
    if (!level) {
        trigger_line(camera, true);
        trigger_line(camera, false);
    } else if (strcmp(level, "high") == 0 || strcmp(level, "low") == 0) {
        trigger_line(camera, strcmp(level, "high") == 0);
    } else {
        return false;
    }
    return true;
}

static bool obey_size(Camera *camera, const char *width, const char *height) {
    if (!width || !height) return false;
    uint8_t values[8];
    put32(values, (uint32_t)strtoul(width, NULL, 10));
    put32(values + 4, (uint32_t)strtoul(height, NULL, 10));
    return registers_write(camera, REG_WIDTH, sizeof values, values) == STATUS_SUCCESS;
}

static bool obey_format(Camera *camera, const char *name) {
    uint8_t value[4];
    if (!name) return false;
    put32(value, pixel_format_named(name));
    return registers_write(camera, REG_PIXEL_FORMAT, sizeof value, value) == STATUS_SUCCESS;
}

static void report(const Camera *camera, char *reply, size_t reply_bytes) {
    char controller[INET_ADDRSTRLEN] = "nobody";
    if (camera->controller.sin_port) inet_ntop(AF_INET, &camera->controller.sin_addr, controller, sizeof controller);
    snprintf(
        reply, reply_bytes,
        "acquiring=%d frame_id=%llu picture=%zu triggers=%u line1=%u missed=%u output0=%u output1=%u controller=%s",
        camera->acquiring, (unsigned long long)camera->frame_id, camera->pictures.next % camera->pictures.count,
        camera->counters[COUNTER_TRIGGERS], camera->counters[COUNTER_LINE1], camera->counters[COUNTER_MISSED],
        register_get(camera, REG_USER_OUTPUT), register_get(camera, REG_USER_OUTPUT + 4), controller);
}

static bool obey_fault(Camera *camera, const char *word, const char *number) {
    double value = number ? strtod(number, NULL) : -1;
    if (value < 0) return false;
    if (strcmp(word, "lose") == 0)
        camera->faults.lost_per_mille = value;
    else if (strcmp(word, "drop") == 0)
        camera->faults.drop_next = (unsigned)value;
    else if (strcmp(word, "id") == 0 && value >= 1)
        camera->frame_id = (uint64_t)value - 1;
    else if (strcmp(word, "stall") == 0)
        camera->faults.stalled_until_ns = now_ns() + (int64_t)(value * 1e9);
    else
        return false;
    return true;
}

static bool obey_state(Camera *camera, const char *word) {
    if (strcmp(word, "release") == 0) {
        camera->heard_ns = 0; /* the heartbeat is lost when the loop looks next */
    } else if (strcmp(word, "rewind") == 0) {
        camera->pictures.next = 0;
        if (camera->acquiring) stream_prepare(camera);
    } else if (strcmp(word, "die") == 0) {
        _Exit(1);
    } else {
        return false;
    }
    return true;
}

/* Do what the line says and write an answer: "ok", what was asked for, or what was wrong. */
void command_obey(Camera *camera, char *line, char *reply, size_t reply_bytes) {
    char *rest = NULL, *word = strtok_r(line, " \t\r\n", &rest);
    char *first = word ? strtok_r(NULL, " \t\r\n", &rest) : NULL;
    char *second = first ? strtok_r(NULL, " \t\r\n", &rest) : NULL;
    snprintf(reply, reply_bytes, "ok");
    if (!word) {
        snprintf(reply, reply_bytes, "error: an empty line; \"help\" lists the commands");
    } else if (strcmp(word, "help") == 0) {
        snprintf(reply, reply_bytes, "%s", help);
    } else if (strcmp(word, "status") == 0) {
        report(camera, reply, reply_bytes);
    } else if (!(strcmp(word, "line") == 0     ? obey_line(camera, first)
                 : strcmp(word, "size") == 0   ? obey_size(camera, first, second)
                 : strcmp(word, "format") == 0 ? obey_format(camera, first)
                                               : obey_fault(camera, word, first) || obey_state(camera, word))) {
        snprintf(reply, reply_bytes, "error: %s %s %s: unknown or impossible; \"help\" lists the commands", word,
                 first ? first : "", second ? second : "");
    }
}
