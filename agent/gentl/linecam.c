/* linecam: options, sockets, and the loop that waits for a client, a command or the end of an exposure. */
#define _GNU_SOURCE /* ppoll, getifaddrs */
#include "linecam.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <ifaddrs.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { GVCP_PORT = 3956, SEND_BUFFER_BYTES = 4 << 20, LONGEST_WAIT_NS = 100000000 };

static const char usage[] =
    "linecam: a GigE Vision camera that replays pictures\n"
    "\n"
    "  linecam --interface 127.0.0.1 --images FOLDER [options]\n"
    "\n"
    "  --interface ADDRESS   address, or name of a network interface, to be a camera at; 127.0.0.N for several\n"
    "  --images FOLDER       *.pgm and *.ppm by name; or a text file with one path per line\n"
    "  --serial NUMBER       serial number, at most 15 letters (LINECAM01)\n"
    "  --pixel-format NAME   format at the start (Mono8)\n"
    "  --packet-size BYTES   GevSCPSPacketSize at the start (8192)\n"
    "  --link-mbit NUMBER    speed of the wire (1000); 0: as fast as the machine can\n"
    "  --lose PER_MILLE      lose this share of the packets\n"
    "  --seed NUMBER         of the dice that lose packets (1)\n"
    "  --drop ID,ID          swallow the frames with these ids\n"
    "  --late ID,ID          send the frames with these ids late, and those behind them not before\n"
    "  --late-ms NUMBER      how late (600)\n"
    "  --unicast             do not hear broadcasts, as a camera behind a router\n"
    "  --no-resend           refuse to send lost packets again\n"
    "  --command-port PORT   take commands in UDP datagrams to this port of the address (0: any; -1: none)\n"
    "  --verbose             print what happens\n"
    "\n"
    "Commands also come by stdin, one a line; \"help\" lists them. The first line printed is\n"
    "\"ready ADDRESS serial NUMBER images COUNT size WIDTHxHEIGHT command PORT\".\n";

typedef struct {
    const char *interface, *images, *serial, *pixel_format, *drop, *late;
    double lost_per_mille, link_mbit, late_ms;
    uint32_t packet_bytes, seed;
    int command_port;
    bool no_resend, unicast, verbose;
} Options;

static volatile sig_atomic_t interrupted;

static void on_signal(int number) {
    (void)number;
    interrupted = 1;
}

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void say(const Camera *camera, const char *format, ...) {
    if (!camera->verbose) return;
    va_list arguments;
    va_start(arguments, format);
    printf("%.3f ", (double)now_ns() / 1e9);
    vprintf(format, arguments);
    putchar('\n');
    fflush(stdout);
    va_end(arguments);
}

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("linecam: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static Options parsed(int count, char **arguments) {
    static const struct option known[] = {
        {"interface",    1, NULL, 'i'},
        {"images",       1, NULL, 'd'},
        {"serial",       1, NULL, 's'},
        {"pixel-format", 1, NULL, 'f'},
        {"packet-size",  1, NULL, 'p'},
        {"lose",         1, NULL, 'l'},
        {"link-mbit",    1, NULL, 'm'},
        {"seed",         1, NULL, 'r'},
        {"drop",         1, NULL, 'D'},
        {"late",         1, NULL, 'L'},
        {"late-ms",      1, NULL, 'M'},
        {"no-resend",    0, NULL, 'n'},
        {"unicast",      0, NULL, 'u'},
        {"command-port", 1, NULL, 'c'},
        {"verbose",      0, NULL, 'v'},
        {"help",         0, NULL, 'h'},
        {NULL,           0, NULL, 0  }
    };
    Options options = {.interface = "127.0.0.1",
                       .serial = "LINECAM01",
                       .pixel_format = "Mono8",
                       .packet_bytes = 8192,
                       .link_mbit = 1000,
                       .late_ms = 600,
                       .seed = 1,
                       .command_port = -1};
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;) {
        switch (option) {
            case 'i': options.interface = optarg; break;
            case 'd': options.images = optarg; break;
            case 's': options.serial = optarg; break;
            case 'f': options.pixel_format = optarg; break;
            case 'p': options.packet_bytes = (uint32_t)strtoul(optarg, NULL, 10); break;
            case 'm': options.link_mbit = strtod(optarg, NULL); break;
            case 'l': options.lost_per_mille = strtod(optarg, NULL); break;
            case 'r': options.seed = (uint32_t)strtoul(optarg, NULL, 10); break;
            case 'D': options.drop = optarg; break;
            case 'L': options.late = optarg; break;
            case 'M': options.late_ms = strtod(optarg, NULL); break;
            case 'u': options.unicast = true; break;
            case 'n': options.no_resend = true; break;
            case 'c': options.command_port = (int)strtol(optarg, NULL, 10); break;
            case 'v': options.verbose = true; break;
            case 'h': fputs(usage, stdout); exit(0);
            default: fputs(usage, stderr); exit(2);
        }
    }
    if (!options.images || optind < count) fail("--images FOLDER is wanted, and nothing without --; see --help");
    if (!pixel_format_named(options.pixel_format))
        fail("--pixel-format %s: not one of this camera", options.pixel_format);
    if (options.packet_bytes < 220 || options.packet_bytes > 16384) fail("--packet-size: wanted 220 to 16384");
    if (strlen(options.serial) > 15) fail("--serial %s: more than 15 letters", options.serial);
    return options;
}

/* Return the address and the broadcast address of an interface given by name or address. */
static struct in_addr find_interface(const char *name, struct in_addr *broadcast) {
    struct in_addr wanted = {0};
    bool by_address = inet_pton(AF_INET, name, &wanted) == 1, found = false;
    struct ifaddrs *interfaces = NULL;
    broadcast->s_addr = htonl(ntohl(wanted.s_addr) | 0x00ffffff); /* of the loopback network, which has none */
    if (getifaddrs(&interfaces) != 0) fail("the network interfaces cannot be listed: %s", strerror(errno));
    for (struct ifaddrs *each = interfaces; each && !found; each = each->ifa_next) {
        if (!each->ifa_addr || each->ifa_addr->sa_family != AF_INET || !each->ifa_netmask) continue;
        struct in_addr address = ((struct sockaddr_in *)each->ifa_addr)->sin_addr;
        found = by_address ? address.s_addr == wanted.s_addr : strcmp(each->ifa_name, name) == 0;
        if (!found) continue;
        wanted = address;
        broadcast->s_addr = address.s_addr | ~((struct sockaddr_in *)each->ifa_netmask)->sin_addr.s_addr;
    }
    freeifaddrs(interfaces);
    if (!by_address && !found) fail("--interface %s: no such interface with an IPv4 address", name);
    return wanted;
}

static int open_socket(struct in_addr address, uint16_t port, bool shared) {
    int descriptor = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = address};
    if (descriptor >= 0 && shared) setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (descriptor < 0 || bind(descriptor, (struct sockaddr *)&name, sizeof name) != 0)
        fail("%s port %u: %s: another camera at this address? give a free one by --interface, such as 127.0.0.2",
             inet_ntoa(address), port, strerror(errno));
    return descriptor;
}

static uint16_t port_of(int descriptor) {
    struct sockaddr_in name;
    socklen_t bytes = sizeof name;
    return getsockname(descriptor, (struct sockaddr *)&name, &bytes) == 0 ? ntohs(name.sin_port) : 0;
}

static void open_sockets(Camera *camera, const Options *options) {
    struct in_addr subnet;
    int bytes = SEND_BUFFER_BYTES;
    camera->address = find_interface(options->interface, &subnet);
    camera->control = open_socket(camera->address, GVCP_PORT, false);
    struct in_addr everywhere = {htonl(INADDR_BROADCAST)};
    camera->broadcast = options->unicast ? -1 : open_socket(everywhere, GVCP_PORT, true);
    camera->subnet = options->unicast ? -1 : open_socket(subnet, GVCP_PORT, true);
    camera->stream = open_socket(camera->address, 0, false);
    setsockopt(camera->stream, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    int whole = IP_PMTUDISC_DO; /* a packet too large for the network gets lost, and is not cut to pieces */
    setsockopt(camera->stream, IPPROTO_IP, IP_MTU_DISCOVER, &whole, sizeof whole);
    camera->command =
        options->command_port < 0 ? -1 : open_socket(camera->address, (uint16_t)options->command_port, false);
}

/* Return the frame ids of a list, ended by 0; NULL where there is none. */
static uint16_t *frame_ids(const char *option, const char *list) {
    uint16_t *ids = NULL;
    size_t count = 0;
    for (const char *at = list; at && *at; count++) {
        char *end;
        unsigned long id = strtoul(at, &end, 10);
        if (end == at || id == 0 || id > 65535)
            fail("%s %s: wanted frame ids of 1 to 65535 with commas between", option, list);
        if (!(ids = realloc(ids, (count + 2) * sizeof *ids))) abort();
        ids[count] = (uint16_t)id;
        ids[count + 1] = 0;
        at = *end == ',' ? end + 1 : end;
    }
    return ids;
}

static void take_command(Camera *camera) {
    char line[512], reply[2048];
    struct sockaddr_in client;
    socklen_t client_bytes = sizeof client;
    ssize_t bytes = recvfrom(camera->command, line, sizeof line - 1, 0, (struct sockaddr *)&client, &client_bytes);
    if (bytes < 0) return;
    line[bytes] = '\0';
    command_obey(camera, line, reply, sizeof reply);
    sendto(camera->command, reply, strlen(reply), 0, (struct sockaddr *)&client, sizeof client);
}

/* Obey the complete lines that stdin has. Returns false at its end. */
static bool take_stdin(Camera *camera) {
    static char text[4096];
    static size_t filled;
    ssize_t bytes = read(STDIN_FILENO, text + filled, sizeof text - 1 - filled);
    if (bytes <= 0) return false;
    filled += (size_t)bytes;
    text[filled] = '\0';
    for (char *end; (end = strchr(text, '\n'));) {
        char reply[2048];
        *end = '\0';
        command_obey(camera, text, reply, sizeof reply);
        puts(reply);
        fflush(stdout);
        filled -= (size_t)(end + 1 - text);
        memmove(text, end + 1, filled + 1);
    }
    if (filled == sizeof text - 1) filled = 0; /* a line of this length is none of ours */
    return true;
}

static struct timespec time_to_wait(const Camera *camera) {
    int64_t wait_ns = LONGEST_WAIT_NS, now = now_ns();
    if (camera->exposing && camera->frame_due_ns - now < wait_ns) wait_ns = camera->frame_due_ns - now;
    if (camera->unsent && camera->faults.held_until_ns - now < wait_ns) wait_ns = camera->faults.held_until_ns - now;
    return (struct timespec){.tv_nsec = wait_ns > 0 ? wait_ns : 0};
}

static void run(Camera *camera) {
    enum { CONTROL, BROADCAST, SUBNET, COMMAND, STDIN, COUNT };
    struct pollfd waits[COUNT] = {
        {camera->control,   POLLIN, 0},
        {camera->broadcast, POLLIN, 0},
        {camera->subnet,    POLLIN, 0},
        {camera->command,   POLLIN, 0},
        {STDIN_FILENO,      POLLIN, 0}
    };
    while (!interrupted) {
        struct timespec wait = time_to_wait(camera);
        if (ppoll(waits, COUNT, &wait, NULL) < 0 && errno != EINTR) fail("poll: %s", strerror(errno));
        for (int i = CONTROL; i <= SUBNET; i++)
            if (waits[i].revents) control_answer(camera, waits[i].fd);
        if (waits[COMMAND].revents) take_command(camera);
        if (waits[STDIN].revents && !take_stdin(camera)) waits[STDIN].fd = -1;
        if (camera->faults.stalled_until_ns > now_ns()) {
            int64_t left_ns = camera->faults.stalled_until_ns - now_ns();
            nanosleep(&(struct timespec){left_ns / 1000000000, left_ns % 1000000000}, NULL);
        }
        control_check_heartbeat(camera);
        trigger_expose_when_due(camera);
        stream_send_waiting(camera);
    }
}

int main(int count, char **arguments) {
    static Camera camera;
    Options options = parsed(count, arguments);
    uint32_t width, height;
    if (!pictures_find(&camera.pictures, options.images, &width, &height))
        fail("--images %s: no readable PGM (P5) or PPM (P6) picture: make some, for instance with OpenCV's imwrite",
             options.images);
    camera.faults.drop_ids = frame_ids("--drop", options.drop);
    camera.faults.late_ids = frame_ids("--late", options.late);
    camera.faults.late_ns = (int64_t)(options.late_ms * 1e6);
    open_sockets(&camera, &options);
    camera.resend = !options.no_resend;
    camera.verbose = options.verbose;
    camera.link_mbit = options.link_mbit;
    camera.faults.lost_per_mille = options.lost_per_mille;
    camera.faults.random_state = (uint64_t)options.seed * 0x9E3779B97F4A7C15u | 1;
    registers_begin(&camera, options.serial, options.pixel_format, width, height);
    register_set(&camera, BOOT_PACKET_SIZE, options.packet_bytes);
    register_set(&camera, BOOT_STREAM_SOURCE_PORT, port_of(camera.stream));
    prctl(PR_SET_TIMERSLACK, 1000UL); /* a wait ends 1 us late, not 50 */
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    signal(SIGPIPE, SIG_IGN);
    printf("ready %s serial %s images %zu size %ux%u command %d\n", inet_ntoa(camera.address), options.serial,
           camera.pictures.count, width, height, camera.command < 0 ? -1 : port_of(camera.command));
    fflush(stdout);
    run(&camera);
    return 0;
}
