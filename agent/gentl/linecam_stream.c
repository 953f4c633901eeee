/* GVSP, the stream: a leader, the payload in packets, a trailer. Lost packets are lost here. */
#define _GNU_SOURCE /* sendmmsg */
#include "linecam.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { PACKET_LEADER = 1, PACKET_TRAILER = 2, PACKET_PAYLOAD = 3 };
enum { PAYLOAD_IMAGE = 0x0001, PAYLOAD_IMAGE_AND_CHUNKS = 0x4001, CHUNK_ID_IMAGE = 1 };
enum { HEADER_BYTES = 8, IP_AND_UDP_BYTES = 28, BATCH = 8 };

typedef struct {
    struct mmsghdr messages[BATCH];
    struct iovec parts[BATCH][2];
    uint8_t headers[BATCH][HEADER_BYTES];
    unsigned count;
    struct sockaddr_in receiver;
    int64_t free_ns; /* when the wire has carried all that was sent */
} Batch;

static struct sockaddr_in receiver(const Camera *camera) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_addr.s_addr = htonl(register_get(camera, BOOT_STREAM_ADDRESS));
    address.sin_port = htons((uint16_t)register_get(camera, BOOT_STREAM_PORT));
    return address;
}

/* Return a number in [0, 1), the same ones for the same seed (xorshift64*, Vigna 2016). */
static double random_share(Camera *camera) {
    uint64_t *state = &camera->faults.random_state;
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (double)((*state * 0x2545F4914F6CDD1Du) >> 11) / 9007199254740992.0;
}

/* Wait as long as a wire of this speed takes for the packets, and for the pause after each that GevSCPD asks for. */
static void wait_for_wire(const Camera *camera, Batch *batch) {
    int64_t now = now_ns();
    if (batch->free_ns < now) batch->free_ns = now;
    for (unsigned i = 0; i < batch->count; i++) {
        size_t bytes = IP_AND_UDP_BYTES + HEADER_BYTES + batch->parts[i][1].iov_len;
        if (camera->link_mbit > 0) batch->free_ns += (int64_t)((double)bytes * 8000 / camera->link_mbit);
        batch->free_ns += register_get(camera, BOOT_PACKET_DELAY);
    }
    int64_t wait_ns = batch->free_ns - now;
    if (wait_ns > 0) nanosleep(&(struct timespec){wait_ns / 1000000000, wait_ns % 1000000000}, NULL);
}

static void flush(Camera *camera, Batch *batch) {
    unsigned sent = 0;
    while (sent < batch->count) {
        int count = sendmmsg(camera->stream, batch->messages + sent, batch->count - sent, 0);
        if (count <= 0) break; /* nobody listens any more: as on a wire, the packets are gone */
        sent += (unsigned)count;
    }
    wait_for_wire(camera, batch);
    batch->count = 0;
}

/* Send one packet with its header. A packet that gets lost is not sent. */
static void send_packet(Camera *camera, Batch *batch, uint16_t block_id, int type, uint32_t packet_id, Status status,
                        const uint8_t *data, size_t bytes) {
    if (camera->faults.lost_per_mille > 0 && random_share(camera) * 1000 < camera->faults.lost_per_mille) return;
    uint8_t *header = batch->headers[batch->count];
    put16(header, status);
    put16(header + 2, block_id);
    put32(header + 4, (uint32_t)type << 24 | packet_id);
    struct iovec *parts = batch->parts[batch->count];
    parts[0] = (struct iovec){header, HEADER_BYTES};
    parts[1] = (struct iovec){(void *)(uintptr_t)data, bytes};
    batch->messages[batch->count].msg_hdr = (struct msghdr){
        .msg_name = &batch->receiver, .msg_namelen = sizeof batch->receiver, .msg_iov = parts, .msg_iovlen = 2};
    if (++batch->count == BATCH) flush(camera, batch);
}

static uint32_t last_packet(const SentFrame *frame) {
    return (uint32_t)((frame->bytes + frame->packet_bytes - 1) / frame->packet_bytes) + 1;
}

/* Send the packets first..last of a frame: 0 is the leader, the last is the trailer. */
static void send_packets(Camera *camera, const SentFrame *frame, uint32_t first, uint32_t last) {
    Batch batch = {.count = 0, .receiver = receiver(camera)};
    for (uint32_t id = first; id <= last && id <= last_packet(frame); id++) {
        if (id == 0) {
            send_packet(camera, &batch, frame->block_id, PACKET_LEADER, id, STATUS_SUCCESS, frame->leader,
                        sizeof frame->leader);
        } else if (id == last_packet(frame)) {
            send_packet(camera, &batch, frame->block_id, PACKET_TRAILER, id, STATUS_SUCCESS, frame->trailer,
                        frame->trailer_bytes);
        } else {
            size_t begin = (size_t)(id - 1) * frame->packet_bytes, left = frame->bytes - begin;
            send_packet(camera, &batch, frame->block_id, PACKET_PAYLOAD, id, STATUS_SUCCESS, frame->payload + begin,
                        left < frame->packet_bytes ? left : frame->packet_bytes);
        }
    }
    flush(camera, &batch);
}

static void write_leader(const Camera *camera, SentFrame *frame, int64_t exposed_ns) {
    bool chunks = register_get(camera, REG_CHUNK_MODE) != 0;
    uint8_t *leader = frame->leader;
    put32(leader, chunks ? PAYLOAD_IMAGE_AND_CHUNKS : PAYLOAD_IMAGE);
    put64(leader + 4, (uint64_t)exposed_ns);
    put32(leader + 12, register_get(camera, REG_PIXEL_FORMAT));
    put32(leader + 16, register_get(camera, REG_WIDTH));
    put32(leader + 20, register_get(camera, REG_HEIGHT));
    put32(leader + 24, register_get(camera, REG_OFFSET_X));
    put32(leader + 28, register_get(camera, REG_OFFSET_Y));
    put32(leader + 32, 0); /* no padding */
    put32(frame->trailer, chunks ? PAYLOAD_IMAGE_AND_CHUNKS : PAYLOAD_IMAGE);
    put32(frame->trailer + 4, register_get(camera, REG_HEIGHT));
    put32(frame->trailer + 8, (uint32_t)frame->bytes);
    put32(frame->trailer + 12, 0); /* chunk layout */
    frame->trailer_bytes = chunks ? 16 : 8;
}

static uint8_t *end_chunk(uint8_t *end, uint32_t id, size_t bytes) {
    put32(end, id);
    put32(end + 4, (uint32_t)bytes);
    return end + 8;
}

static void write_chunk(const Camera *camera, int chunk, int64_t exposed_ns, uint8_t *out) {
    switch (chunk) {
        case CHUNK_TIMESTAMP: put64(out, (uint64_t)exposed_ns); break;
        case CHUNK_FRAME_ID: put64(out, camera->frame_id); break;
        case CHUNK_COUNTERS:
            for (int i = 0; i < COUNTER_COUNT; i++) put32(out + 4 * i, camera->exposure_counters[i]);
            break;
        case CHUNK_EXPOSURE_TIME: memcpy(out, camera->registers + REG_EXPOSURE_TIME_US, 8); break;
        case CHUNK_GAIN: memcpy(out, camera->registers + REG_GAIN_DB, 8); break;
        default: put32(out, line_status(camera));
    }
}

static void append_chunks(const Camera *camera, SentFrame *frame, int64_t exposed_ns) {
    if (!register_get(camera, REG_CHUNK_MODE)) return;
    uint8_t *end = end_chunk(frame->payload + image_bytes(camera), CHUNK_ID_IMAGE, image_bytes(camera));
    for (int chunk = 0; chunk < CHUNK_COUNT; chunk++) {
        if (!register_get(camera, REG_CHUNK_ENABLE + 4 * (uint32_t)chunk)) continue;
        write_chunk(camera, chunk, exposed_ns, end);
        end = end_chunk(end + chunk_length(chunk), (uint32_t)(CHUNK_ID_IMAGE + 1 + chunk), chunk_length(chunk));
    }
}

/* Render the next picture now, so that a trigger does not have to wait for it. */
void stream_prepare(Camera *camera) {
    SentFrame *frame = &camera->sent[camera->sent_next];
    size_t bytes = payload_bytes(camera);
    if (bytes > frame->capacity) {
        free(frame->payload);
        frame->capacity = bytes;
        if (!(frame->payload = malloc(bytes))) abort();
    }
    frame->bytes = bytes;
    frame->block_id = 0; /* none: not sent yet */
    frame->packet_bytes = (register_get(camera, BOOT_PACKET_SIZE) & 0xffff) - IP_AND_UDP_BYTES - HEADER_BYTES;
    pictures_render_next(camera, frame->payload);
}

static bool is_listed(const uint16_t *ids, uint16_t block_id) {
    for (; ids && *ids; ids++)
        if (*ids == block_id) return true;
    return false;
}

static bool swallowed(Camera *camera, uint16_t block_id) {
    if (camera->faults.drop_next == 0) return is_listed(camera->faults.drop_ids, block_id);
    camera->faults.drop_next--;
    return true;
}

/* Send the frames that wait, the oldest first, unless they are held back. */
void stream_send_waiting(Camera *camera) {
    while (camera->unsent > 0 && now_ns() >= camera->faults.held_until_ns) {
        const SentFrame *frame = &camera->sent[(camera->sent_next + SENT_FRAMES - camera->unsent) % SENT_FRAMES];
        camera->unsent--;
        send_packets(camera, frame, 0, last_packet(frame));
    }
}

/* Send the prepared frame under the number of the exposure. Block ids have 16 bits and leave out 0. */
void stream_send_frame(Camera *camera, int64_t exposed_ns) {
    SentFrame *frame = &camera->sent[camera->sent_next];
    uint16_t block_id = (uint16_t)((camera->frame_id - 1) % 65535 + 1);
    if (swallowed(camera, block_id)) {
        say(camera, "frame %u swallowed", block_id);
        return;
    }
    frame->block_id = block_id;
    append_chunks(camera, frame, exposed_ns);
    write_leader(camera, frame, exposed_ns);
    camera->sent_next = (camera->sent_next + 1) % SENT_FRAMES;
    camera->unsent++;
    if (is_listed(camera->faults.late_ids, block_id)) camera->faults.held_until_ns = now_ns() + camera->faults.late_ns;
    if (camera->unsent == SENT_FRAMES - 1) camera->faults.held_until_ns = 0; /* the next one needs the room */
    stream_send_waiting(camera);
}

/* Answer a request for packets that the receiver has not seen. */
void stream_send_again(Camera *camera, uint16_t block_id, uint32_t first, uint32_t last) {
    if (!camera->resend || !register_get(camera, BOOT_STREAM_PORT)) return;
    for (int i = 0; i < SENT_FRAMES; i++) {
        if (camera->sent[i].block_id == block_id && block_id != 0) {
            send_packets(camera, &camera->sent[i], first, last);
            return;
        }
    }
    Batch batch = {.count = 0, .receiver = receiver(camera)};
    send_packet(camera, &batch, block_id, PACKET_PAYLOAD, first, STATUS_PACKET_UNAVAILABLE, NULL, 0);
    flush(camera, &batch);
}

/* Send one packet of the full size, by which the receiver learns whether the network carries such. */
void stream_send_test_packet(Camera *camera) {
    uint8_t packet[16384] = {0};
    size_t bytes = (register_get(camera, BOOT_PACKET_SIZE) & 0xffff) - IP_AND_UDP_BYTES;
    struct sockaddr_in to = receiver(camera);
    sendto(camera->stream, packet, bytes, 0, (struct sockaddr *)&to, sizeof to);
}
