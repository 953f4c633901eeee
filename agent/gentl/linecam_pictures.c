/* PGM and PPM files in, pixels of any of the camera's formats out. */
#define _POSIX_C_SOURCE 200809L
#include "linecam.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MOST_RENDERED_BYTES (128u << 20) /* pictures beyond this are read from the disk again */

typedef struct {
    uint32_t width, height, channels, maximum;
    uint16_t *samples; /* row by row, channels interleaved, 0..maximum */
} Picture;

typedef enum { GRAY, BAYER_RG, BAYER_GB, BAYER_GR, BAYER_BG, RGB, BGR } Layout;
typedef enum { WHOLE_BYTES, LSB_PACKED, GIGE_PACKED } Packing;

static const struct PixelFormat {
    const char *name;
    uint32_t code; /* PFNC */
    unsigned bits; /* of one sample */
    Layout layout;
    Packing packing;
} pixel_formats[] = {
    {"Mono8",        0x01080001, 8,  GRAY,     WHOLE_BYTES},
    {"Mono10",       0x01100003, 10, GRAY,     WHOLE_BYTES},
    {"Mono12",       0x01100005, 12, GRAY,     WHOLE_BYTES},
    {"Mono16",       0x01100007, 16, GRAY,     WHOLE_BYTES},
    {"Mono10p",      0x010a0046, 10, GRAY,     LSB_PACKED },
    {"Mono12p",      0x010c0047, 12, GRAY,     LSB_PACKED },
    {"Mono10Packed", 0x010c0004, 10, GRAY,     GIGE_PACKED},
    {"Mono12Packed", 0x010c0006, 12, GRAY,     GIGE_PACKED},
    {"BayerRG8",     0x01080009, 8,  BAYER_RG, WHOLE_BYTES},
    {"BayerGB8",     0x0108000a, 8,  BAYER_GB, WHOLE_BYTES},
    {"BayerGR8",     0x01080008, 8,  BAYER_GR, WHOLE_BYTES},
    {"BayerBG8",     0x0108000b, 8,  BAYER_BG, WHOLE_BYTES},
    {"RGB8",         0x02180014, 8,  RGB,      WHOLE_BYTES},
    {"BGR8",         0x02180015, 8,  BGR,      WHOLE_BYTES},
};
enum { PIXEL_FORMATS = sizeof pixel_formats / sizeof pixel_formats[0] };

static const struct PixelFormat *format_of(uint32_t code) {
    for (int i = 0; i < PIXEL_FORMATS; i++)
        if (pixel_formats[i].code == code) return &pixel_formats[i];
    return NULL;
}

unsigned pixel_bits(uint32_t pixel_format) {
    return format_of(pixel_format) ? pixel_format >> 16 & 0xff : 0; /* PFNC has the size of a pixel in these bits */
}

uint32_t pixel_format_named(const char *name) {
    for (int i = 0; i < PIXEL_FORMATS; i++)
        if (strcmp(pixel_formats[i].name, name) == 0) return pixel_formats[i].code;
    return 0;
}

static bool read_number(FILE *file, uint32_t *number) {
    int c = fgetc(file);
    while (c == '#' || c == ' ' || c == '\t' || c == '\r' || c == '\n') {
        if (c == '#')
            while (c != '\n' && c != EOF) c = fgetc(file);
        c = fgetc(file);
    }
    if (c < '0' || c > '9') return false;
    for (*number = 0; c >= '0' && c <= '9'; c = fgetc(file)) {
        if (*number > 100000000) return false;
        *number = *number * 10 + (uint32_t)(c - '0');
    }
    return true; /* the one separator after the number is read too */
}

static bool read_header(FILE *file, Picture *picture) {
    int magic = fgetc(file) == 'P' ? fgetc(file) : 0;
    picture->channels = magic == '5' ? 1 : 3;
    return (magic == '5' || magic == '6') && read_number(file, &picture->width) &&
           read_number(file, &picture->height) && read_number(file, &picture->maximum) && picture->width > 0 &&
           picture->height > 0 && picture->width <= 65535 && picture->height <= 65535 && picture->maximum > 0 &&
           picture->maximum <= 65535;
}

static bool read_samples(FILE *file, Picture *picture) {
    size_t count = (size_t)picture->width * picture->height * picture->channels;
    size_t sample_bytes = picture->maximum > 255 ? 2 : 1;
    uint8_t *raw = malloc(count * sample_bytes);
    picture->samples = malloc(count * sizeof *picture->samples);
    bool read = raw && picture->samples && fread(raw, sample_bytes, count, file) == count;
    for (size_t i = 0; read && i < count; i++) {
        uint32_t sample = sample_bytes == 2 ? get16(raw + 2 * i) : raw[i];
        picture->samples[i] = (uint16_t)(sample <= picture->maximum ? sample : picture->maximum);
    }
    free(raw);
    return read;
}

static bool read_picture(const char *path, Picture *picture) {
    memset(picture, 0, sizeof *picture);
    FILE *file = fopen(path, "rb");
    bool read = file && read_header(file, picture) && read_samples(file, picture);
    if (file) fclose(file);
    if (!read) {
        free(picture->samples);
        picture->samples = NULL;
        fprintf(stderr, "linecam: %s: not a readable binary PGM (P5) or PPM (P6) file, a black picture is shown\n",
                path);
    }
    return read;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static void add_path(Pictures *pictures, const char *path) {
    char **paths = realloc(pictures->paths, (pictures->count + 1) * sizeof *paths);
    char *copy = strdup(path);
    if (!paths || !copy) abort();
    pictures->paths = paths;
    pictures->paths[pictures->count++] = copy;
}

static void find_in_folder(Pictures *pictures, const char *folder) {
    DIR *directory = opendir(folder);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        const char *suffix = strrchr(entry->d_name, '.');
        if (!suffix || (strcmp(suffix, ".pgm") != 0 && strcmp(suffix, ".ppm") != 0)) continue;
        char path[4096];
        if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) < (int)sizeof path) add_path(pictures, path);
    }
    if (directory) closedir(directory);
    if (pictures->count) qsort(pictures->paths, pictures->count, sizeof *pictures->paths, by_name);
}

static void find_in_list(Pictures *pictures, const char *list) {
    FILE *file = fopen(list, "r");
    char line[4096];
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\r\n")] = '\0';
        if (line[0] && line[0] != '#') add_path(pictures, line);
    }
    if (file) fclose(file);
}

/* Find the pictures of a folder (*.pgm and *.ppm by name) or of a text file with one path per line.
 * The size of the first is the size of the sensor. */
bool pictures_find(Pictures *pictures, const char *folder_or_list, uint32_t *width, uint32_t *height) {
    struct stat status;
    if (stat(folder_or_list, &status) != 0) return false;
    if (S_ISDIR(status.st_mode))
        find_in_folder(pictures, folder_or_list);
    else
        find_in_list(pictures, folder_or_list);
    Picture first;
    if (pictures->count == 0 || !read_picture(pictures->paths[0], &first)) return false;
    *width = first.width;
    *height = first.height;
    free(first.samples);
    pictures->rendered = calloc(pictures->count, sizeof *pictures->rendered);
    return pictures->rendered != NULL;
}

/* After a change of format or region. */
void pictures_forget_rendered(Pictures *pictures) {
    for (size_t i = 0; i < pictures->count; i++) {
        free(pictures->rendered[i]);
        pictures->rendered[i] = NULL;
    }
    pictures->rendered_bytes = 0;
}

/* Return which of red, green, blue a Bayer sensor sees at a place. */
static unsigned bayer_channel(Layout layout, uint32_t x, uint32_t y) {
    static const unsigned char tiles[][4] = {
        [BAYER_RG] = {0, 1, 1, 2},
          [BAYER_GB] = {1, 2, 0, 1},
          [BAYER_GR] = {1, 0, 2, 1},
          [BAYER_BG] = {2, 1, 1, 0}
    };
    return tiles[layout][(y & 1) * 2 + (x & 1)];
}

/* Return one sample, 0..maximum; black outside of the picture. channel 3: luminance */
static uint32_t sample_at(const Picture *picture, uint32_t x, uint32_t y, unsigned channel) {
    if (x >= picture->width || y >= picture->height || !picture->samples) return 0;
    const uint16_t *sample = picture->samples + ((size_t)y * picture->width + x) * picture->channels;
    if (picture->channels == 1) return sample[0];
    return channel < 3 ? sample[channel] : (77u * sample[0] + 150u * sample[1] + 29u * sample[2]) >> 8;
}

/* Write the samples of one row, each scaled to 0..2^bits - 1; colours interleaved. */
static void render_row(const Picture *picture, const struct PixelFormat *format, const uint16_t *scaled, uint32_t y,
                       uint32_t x_begin, uint32_t width, uint16_t *row) {
    for (uint32_t i = 0; i < width; i++) {
        uint32_t x = x_begin + i;
        if (format->layout == GRAY)
            row[i] = scaled[sample_at(picture, x, y, 3)];
        else if (format->layout < RGB)
            row[i] = scaled[sample_at(picture, x, y, bayer_channel(format->layout, x, y))];
        else
            for (unsigned c = 0; c < 3; c++)
                row[3 * i + c] = scaled[sample_at(picture, x, y, format->layout == RGB ? c : 2 - c)];
    }
}

/* Append samples to the pixels, of which `position` are there already. The pixels are zero at the start. */
static void pack(const struct PixelFormat *format, const uint16_t *samples, size_t count, size_t position,
                 uint8_t *out) {
    for (size_t i = 0; i < count; i++, position++) {
        uint32_t value = samples[i];
        if (format->packing == WHOLE_BYTES && format->bits == 8) {
            out[position] = (uint8_t)value;
        } else if (format->packing == WHOLE_BYTES) { /* pixels are little endian, unlike everything else */
            out[2 * position] = (uint8_t)value;
            out[2 * position + 1] = (uint8_t)(value >> 8);
        } else if (format->packing == LSB_PACKED) {
            size_t bit = position * format->bits;
            uint32_t shifted = value << (bit & 7);
            for (size_t byte = bit >> 3; shifted; byte++, shifted >>= 8) out[byte] |= (uint8_t)shifted;
        } else { /* two pixels in three bytes: high parts outside, low parts share the byte between */
            unsigned low_bits = format->bits - 8, low = value & ((1u << low_bits) - 1);
            uint8_t *group = out + position / 2 * 3;
            group[position & 1 ? 2 : 0] = (uint8_t)(value >> low_bits);
            group[1] |= (uint8_t)(position & 1 ? low << 4 : low);
        }
    }
}

static void render(const Camera *camera, const Picture *picture, uint8_t *out) {
    const struct PixelFormat *format = format_of(register_get(camera, REG_PIXEL_FORMAT));
    uint32_t width = register_get(camera, REG_WIDTH), height = register_get(camera, REG_HEIGHT);
    uint32_t x = register_get(camera, REG_OFFSET_X), y = register_get(camera, REG_OFFSET_Y);
    size_t row_samples = (size_t)width * (format->layout >= RGB ? 3 : 1);
    uint32_t maximum = picture->maximum ? picture->maximum : 1, brightest = (1u << format->bits) - 1;
    uint16_t *row = malloc(row_samples * sizeof *row);
    uint16_t *scaled = malloc((maximum + 1) * sizeof *scaled);
    if (!row || !scaled) abort();
    for (uint32_t level = 0; level <= maximum; level++)
        scaled[level] = (uint16_t)(((uint64_t)level * brightest + maximum / 2) / maximum);
    memset(out, 0, image_bytes(camera));
    for (uint32_t i = 0; i < height; i++) {
        render_row(picture, format, scaled, y + i, x, width, row);
        pack(format, row, row_samples, i * row_samples, out);
    }
    free(row);
    free(scaled);
}

/* Write the pixels of the next picture, in the current format and region. After the last comes the first again. */
void pictures_render_next(Camera *camera, uint8_t *out) {
    Pictures *pictures = &camera->pictures;
    size_t index = pictures->next % pictures->count, bytes = image_bytes(camera);
    if (!pictures->rendered[index]) {
        Picture picture;
        read_picture(pictures->paths[index], &picture);
        render(camera, &picture, out);
        free(picture.samples);
        if (pictures->rendered_bytes + bytes > MOST_RENDERED_BYTES) return;
        if (!(pictures->rendered[index] = malloc(bytes))) return;
        memcpy(pictures->rendered[index], out, bytes);
        pictures->rendered_bytes += bytes;
        return;
    }
    memcpy(out, pictures->rendered[index], bytes);
}
