/* GVCP, the control channel: what a client asks, whether it may, and the answer. */
#define _POSIX_C_SOURCE 200809L
#include "linecam.h"

#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>

enum {
    COMMAND_DISCOVERY = 0x0002,
    COMMAND_RESEND = 0x0040,
    COMMAND_READ_REGISTER = 0x0080,
    COMMAND_WRITE_REGISTER = 0x0082,
    COMMAND_READ_MEMORY = 0x0084,
    COMMAND_WRITE_MEMORY = 0x0086,
};
enum { GVCP_KEY = 0x42, ACKNOWLEDGE = 0x01, HEADER_BYTES = 8, MOST_DATA_BYTES = 540 };
enum { PRIVILEGE_EXCLUSIVE = 1, PRIVILEGE_CONTROL = 2 };

static bool controlled(const Camera *camera) { return camera->controller.sin_port != 0; }

static bool same(const struct sockaddr_in *a, const struct sockaddr_in *b) {
    return a->sin_port == b->sin_port && a->sin_addr.s_addr == b->sin_addr.s_addr;
}

static void set_controller(Camera *camera, const struct sockaddr_in *client, uint32_t privilege) {
    memset(&camera->controller, 0, sizeof camera->controller);
    if (privilege) camera->controller = *client;
    camera->heard_ns = now_ns();
    register_set(camera, BOOT_PRIVILEGE, privilege);
    register_set(camera, BOOT_CONTROLLER_ADDRESS, ntohl(camera->controller.sin_addr.s_addr));
    register_set(camera, BOOT_CONTROLLER_PORT, ntohs(camera->controller.sin_port));
    if (!privilege) { /* nobody is there any more whom a picture could be sent to */
        acquisition_stop(camera);
        register_set(camera, BOOT_STREAM_PORT, 0);
    }
}

/* Free the camera if its controller has not been heard of for longer than the heartbeat allows. */
void control_check_heartbeat(Camera *camera) {
    int64_t limit_ns = (int64_t)register_get(camera, BOOT_HEARTBEAT_MS) * 1000000;
    if (!controlled(camera) || now_ns() - camera->heard_ns <= limit_ns) return;
    say(camera, "heartbeat of %s:%u lost", inet_ntoa(camera->controller.sin_addr), ntohs(camera->controller.sin_port));
    set_controller(camera, NULL, 0);
}

static Status write_privilege(Camera *camera, const struct sockaddr_in *client, uint32_t privilege) {
    if (controlled(camera) && !same(client, &camera->controller)) return STATUS_ACCESS_DENIED;
    set_controller(camera, client, privilege & (PRIVILEGE_EXCLUSIVE | PRIVILEGE_CONTROL));
    return STATUS_SUCCESS;
}

static Status write_checked(Camera *camera, const struct sockaddr_in *client, uint32_t address, size_t bytes,
                            const uint8_t *in) {
    if (address == BOOT_PRIVILEGE && bytes == 4) return write_privilege(camera, client, get32(in));
    if (!controlled(camera) || !same(client, &camera->controller)) return STATUS_ACCESS_DENIED;
    return registers_write(camera, address, bytes, in);
}

static Status read_checked(Camera *camera, const struct sockaddr_in *client, uint32_t address, size_t bytes,
                           uint8_t *out) {
    bool exclusive = register_get(camera, BOOT_PRIVILEGE) & PRIVILEGE_EXCLUSIVE;
    if (exclusive && controlled(camera) && !same(client, &camera->controller) && address != BOOT_PRIVILEGE)
        return STATUS_ACCESS_DENIED;
    return registers_read(camera, address, bytes, out);
}

static Status read_registers(Camera *camera, const struct sockaddr_in *client, const uint8_t *in, size_t in_bytes,
                             uint8_t *out, size_t *out_bytes) {
    Status status = STATUS_SUCCESS;
    for (size_t i = 0; i + 4 <= in_bytes && status == STATUS_SUCCESS; i += 4) {
        status = read_checked(camera, client, get32(in + i), 4, out + i);
        if (status == STATUS_SUCCESS) *out_bytes = i + 4;
    }
    return status;
}

static Status write_registers(Camera *camera, const struct sockaddr_in *client, const uint8_t *in, size_t in_bytes,
                              uint8_t *out, size_t *out_bytes) {
    Status status = STATUS_SUCCESS;
    uint32_t written = 0;
    for (size_t i = 0; i + 8 <= in_bytes && status == STATUS_SUCCESS; i += 8) {
        status = write_checked(camera, client, get32(in + i), 4, in + i + 4);
        if (status == STATUS_SUCCESS) written++;
    }
    put32(out, written);
    *out_bytes = 4;
    return status;
}

static Status read_memory(Camera *camera, const struct sockaddr_in *client, const uint8_t *in, size_t in_bytes,
                          uint8_t *out, size_t *out_bytes) {
    size_t bytes = in_bytes >= 8 ? get16(in + 6) : 0;
    if (bytes == 0 || bytes > MOST_DATA_BYTES - 4) return STATUS_INVALID_PARAMETER;
    memcpy(out, in, 4);
    Status status = read_checked(camera, client, get32(in), bytes, out + 4);
    if (status == STATUS_SUCCESS) *out_bytes = 4 + bytes;
    return status;
}

static Status write_memory(Camera *camera, const struct sockaddr_in *client, const uint8_t *in, size_t in_bytes,
                           uint8_t *out, size_t *out_bytes) {
    if (in_bytes <= 4) return STATUS_INVALID_PARAMETER;
    Status status = write_checked(camera, client, get32(in), in_bytes - 4, in + 4);
    put32(out, status == STATUS_SUCCESS ? (uint32_t)(in_bytes - 4) : 0);
    *out_bytes = 4;
    return status;
}

static Status carry_out(Camera *camera, const struct sockaddr_in *client, uint32_t command, const uint8_t *in,
                        size_t in_bytes, uint8_t *out, size_t *out_bytes) {
    switch (command) {
        case COMMAND_DISCOVERY:
            *out_bytes = BOOT_DISCOVERY_BYTES;
            return registers_read(camera, 0, BOOT_DISCOVERY_BYTES, out);
        case COMMAND_READ_REGISTER: return read_registers(camera, client, in, in_bytes, out, out_bytes);
        case COMMAND_WRITE_REGISTER: return write_registers(camera, client, in, in_bytes, out, out_bytes);
        case COMMAND_READ_MEMORY: return read_memory(camera, client, in, in_bytes, out, out_bytes);
        case COMMAND_WRITE_MEMORY: return write_memory(camera, client, in, in_bytes, out, out_bytes);
        default: return STATUS_NOT_IMPLEMENTED;
    }
}

static void reply(Camera *camera, const struct sockaddr_in *client, const uint8_t *packet, size_t bytes) {
    sendto(camera->control, packet, bytes, 0, (const struct sockaddr *)client, sizeof *client);
}

/* A client that saw no answer sends its request again: it must not be carried out twice. */
static bool answered_before(Camera *camera, const struct sockaddr_in *client, uint16_t request, bool writes) {
    if (!writes || request != camera->last_request || !same(client, &camera->last_sender)) return false;
    reply(camera, client, camera->last_reply, camera->last_reply_bytes);
    return true;
}

static void remember_answer(Camera *camera, const struct sockaddr_in *client, uint16_t request, const uint8_t *answer,
                            size_t bytes) {
    camera->last_sender = *client;
    camera->last_request = request;
    camera->last_reply_bytes = bytes < sizeof camera->last_reply ? bytes : sizeof camera->last_reply;
    memcpy(camera->last_reply, answer, camera->last_reply_bytes);
}

/* Take one datagram from the socket and answer it. */
void control_answer(Camera *camera, int socket) {
    uint8_t in[1024], answer[HEADER_BYTES + MOST_DATA_BYTES] = {0};
    struct sockaddr_in client;
    socklen_t client_bytes = sizeof client;
    ssize_t received = recvfrom(socket, in, sizeof in, 0, (struct sockaddr *)&client, &client_bytes);
    if (received < HEADER_BYTES || in[0] != GVCP_KEY) return;
    uint32_t command = get16(in + 2), data_bytes = get16(in + 4);
    uint16_t request = (uint16_t)get16(in + 6);
    const uint8_t *data = in + HEADER_BYTES;
    if (data_bytes > (size_t)received - HEADER_BYTES || data_bytes > MOST_DATA_BYTES) return;
    if (same(&client, &camera->controller)) camera->heard_ns = now_ns();
    if (command == COMMAND_RESEND) { /* is answered by packets of the stream */
        if (data_bytes >= 12) stream_send_again(camera, (uint16_t)get16(data + 2), get32(data + 4), get32(data + 8));
        return;
    }
    bool writes = command == COMMAND_WRITE_REGISTER || command == COMMAND_WRITE_MEMORY;
    if (answered_before(camera, &client, request, writes)) return;
    size_t out_bytes = 0;
    Status status = carry_out(camera, &client, command, data, data_bytes, answer + HEADER_BYTES, &out_bytes);
    put16(answer, status);
    put16(answer + 2, command + 1); /* the acknowledge of a command has the next number */
    put16(answer + 4, (uint32_t)out_bytes);
    put16(answer + 6, request);
    if (writes) remember_answer(camera, &client, request, answer, HEADER_BYTES + out_bytes);
    if (in[1] & ACKNOWLEDGE) reply(camera, &client, answer, HEADER_BYTES + out_bytes);
}
