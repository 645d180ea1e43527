/* A JPEG file read to its end, and sums over some of its rows: all of the file is decoded as far as damage can show
   (every bit of its entropy code), and rows that nobody asks for become no pixels. What libjpeg-turbo says of the whole
   file it says here. */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <jpeglib.h>

#ifndef LIBJPEG_TURBO_VERSION_NUMBER
#define LIBJPEG_TURBO_VERSION_NUMBER 0
#endif
#if defined(__x86_64__) && !defined(PLAIN)
#define QUICK __attribute__((target("avx2")))
#endif

enum { STRIP = 16, AT_ONCE = 4, MOST_BANDS = 3, ROW_PAD = 64, UNALIGNED = 8 };

struct said { struct jpeg_error_mgr manager; jmp_buf jump; };

/* Sums over rows, one number for each byte of a row. */
struct columns { uint32_t *total, *square; uint8_t *low, *high; };

static void on_error(j_common_ptr jpeg) { longjmp(((struct said *)jpeg->err)->jump, 1); }
static void on_message(j_common_ptr jpeg) { (void)jpeg; }

static inline __attribute__((always_inline)) void add(const uint8_t *restrict row, size_t values, struct columns to) {
    uint32_t *restrict total = to.total, *restrict square = to.square;
    uint8_t *restrict low = to.low, *restrict high = to.high;
    for (size_t i = 0; i < values; i++) {
        const uint16_t value = row[i];
        total[i] += value;
        square[i] += (uint16_t)(value * value);
        low[i] = row[i] < low[i] ? row[i] : low[i];
        high[i] = row[i] > high[i] ? row[i] : high[i];
    }
}

static void add_plain(const uint8_t *row, size_t values, struct columns to) { add(row, values, to); }

#ifdef QUICK
QUICK static void add_quick(const uint8_t *row, size_t values, struct columns to) { add(row, values, to); }
static int is_quick(void) { return __builtin_cpu_supports("avx2"); }
#else
#define add_quick add_plain
static int is_quick(void) { return 0; }
#endif

/* Strips of 16 rows, the first one from row 16 * `first` on, each further one 16 * `step` below; of their pixels, by
   the fast DCT and plain upsampling: count, then for each band sum, sum of squares, smallest, largest.
   Returns 0, or 1 where libjpeg-turbo has something to say, or the picture is another than was said. */
int sum_rows(const uint8_t *data, size_t size, int width, int height, int bands, int first, int step, uint8_t *memory,
             size_t memory_bytes, uint64_t *out) {
    if (LIBJPEG_TURBO_VERSION_NUMBER < 2000006) return 1; /* skips wrongly where rows are enlarged and coloured at once */
    if (bands != 1 && bands != MOST_BANDS) return 1;
    const size_t values = (size_t)width * bands, wide = (values + ROW_PAD) / ROW_PAD * ROW_PAD;
    if (first < 0 || step < 1 || (2 * sizeof(uint32_t) + 2 + AT_ONCE) * wide + 2 * ROW_PAD > memory_bytes) return 1;
    memory += (size_t)-(uintptr_t)memory % ROW_PAD;
    struct columns to = {(uint32_t *)memory, (uint32_t *)memory + wide, memory + 8 * wide, memory + 9 * wide};
    JSAMPROW rows[AT_ONCE];
    /* Rows that are aligned libjpeg-turbo writes around the caches, and they are read at once. */
    for (int i = 0; i < AT_ONCE; i++) rows[i] = memory + (10 + i) * wide + UNALIGNED;
    memset(memory, 0, 8 * wide);
    memset(to.low, 255, wide);
    memset(to.high, 0, wide);
    struct jpeg_decompress_struct jpeg;
    struct said said;
    jpeg.err = jpeg_std_error(&said.manager);
    said.manager.error_exit = on_error;
    said.manager.output_message = on_message;
    if (setjmp(said.jump)) {
        jpeg_destroy_decompress(&jpeg);
        return 1;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, (unsigned char *)data, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = bands == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg.dct_method = JDCT_IFAST;
    jpeg.do_fancy_upsampling = FALSE;
    jpeg_start_decompress(&jpeg);
    const int is_same = (int)jpeg.output_width == width && (int)jpeg.output_height == height &&
                        jpeg.num_components == bands && jpeg.output_components == bands;
    void (*const add_row)(const uint8_t *, size_t, struct columns) = is_quick() ? add_quick : add_plain;
    uint64_t seen = 0;
    for (int y = 0; is_same && y < height;) {
        const int strip = y / STRIP, ends = (strip + 1) * STRIP < height ? (strip + 1) * STRIP : height;
        if (strip >= first && (strip - first) % step == 0) {
            const int count = jpeg_read_scanlines(&jpeg, rows, ends - y < AT_ONCE ? ends - y : AT_ONCE);
            for (int i = 0; i < count; i++) add_row(rows[i], values, to);
            seen += count;
            y += count;
            continue;
        }
        /* To the next strip; the last row is read, for what is skipped to the end is not decoded. */
        int next = strip < first ? first : strip + step - (strip - first) % step;
        if (next > height / STRIP || next * STRIP >= height) {
            if (y < height - 1) jpeg_skip_scanlines(&jpeg, height - 1 - y);
            jpeg_read_scanlines(&jpeg, rows, 1);
            break;
        }
        jpeg_skip_scanlines(&jpeg, next * STRIP - y);
        y = next * STRIP;
    }
    if (is_same) jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    if (!is_same || said.manager.num_warnings) return 1;
    out[0] = seen * width;
    for (int band = 0; band < bands; band++) {
        uint64_t total = 0, square = 0, low = 255, high = 0;
        for (size_t i = band; i < values; i += bands) {
            total += to.total[i];
            square += to.square[i];
            low = to.low[i] < low ? to.low[i] : low;
            high = to.high[i] > high ? to.high[i] : high;
        }
        uint64_t *const place = out + 1 + 4 * band;
        place[0] = total, place[1] = square, place[2] = low, place[3] = high;
    }
    return 0;
}
