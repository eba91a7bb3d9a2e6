/* Part of a JPEG, to the pixel what decoding the whole would give: the rows above the box are read but not
 * transformed, those below not even read, and of each row only the columns of the box are.
 *
 * Needs libjpeg-turbo (jpeg_crop_scanline, jpeg_skip_scanlines). Any warning or error of the library, and anything
 * but a baseline image of one scan, is refused with ValueError: the caller then decodes the whole by other means.
 * No size that the file names is trusted: the caller says what it expects, and a file that differs is refused.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(JCS_EXTENSIONS) || !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 1005003
#error "libjpeg-turbo 1.5.3 or newer is needed"
#endif

/* Columns beyond the box on each side: what its outermost pixels take from their neighbours' chroma. */
#define MARGIN 4

typedef struct {
    struct jpeg_error_mgr library; /* first, so that the library's pointer is ours */
    jmp_buf escape;
    char message[JMSG_LENGTH_MAX];
} ErrorManager;

typedef struct {
    const unsigned char *bytes;
    size_t num_bytes;
    size_t scan; /* where the only scan begins, in bytes */
    JDIMENSION full_width, full_height; /* of the file, px */
    unsigned factor;                    /* 1, 2, 4 or 8: decoded this many times smaller */
    JDIMENSION left, top, width, height; /* the box, px of the image decoded at that factor */
    J_COLOR_SPACE colours;
    int pixel_size; /* bytes */
    unsigned char *out;
} Request;

static void give_up(j_common_ptr cinfo) {
    ErrorManager *errors = (ErrorManager *)cinfo->err;
    (*cinfo->err->format_message)(cinfo, errors->message);
    longjmp(errors->escape, 1);
}

static void give_up_on_warnings(j_common_ptr cinfo, int level) {
    if (level < 0) give_up(cinfo);
}

static void refuse(struct jpeg_decompress_struct *cinfo, const char *message) {
    ErrorManager *errors = (ErrorManager *)cinfo->err;
    snprintf(errors->message, sizeof errors->message, "%s", message);
    longjmp(errors->escape, 1);
}

/* Whether nothing but the end of the image follows the scan. What lies below the box is not read, and a decoder of the
 * whole would find there that the file is cut off, or stumble over a marker that does not belong. */
static int ends_well(const unsigned char *bytes, size_t num_bytes, size_t scan) {
    const unsigned char *end = bytes + num_bytes, *at = bytes + scan + 2; /* behind the marker of the scan itself */
    while ((at = memchr(at, 0xFF, (size_t)(end - at))) != NULL && at + 1 < end) {
        unsigned char marker = at[1];
        if (marker == 0xD9) return 1;
        if (marker == 0xFF) at += 1;                                     /* filling */
        else if (marker == 0 || (marker >= 0xD0 && marker <= 0xD7)) at += 2; /* a plain byte, a restart */
        else return 0;
    }
    return 0;
}

/* 0, or 1 with a message. Calls nothing of Python. */
static int decode(const Request *request, ErrorManager *errors) {
    struct jpeg_decompress_struct cinfo;
    unsigned char *volatile row = NULL;

    memset(&cinfo, 0, sizeof cinfo);
    cinfo.err = jpeg_std_error(&errors->library);
    errors->library.error_exit = give_up;
    errors->library.emit_message = give_up_on_warnings;
    if (setjmp(errors->escape)) {
        free(row);
        jpeg_destroy_decompress(&cinfo);
        return 1;
    }
    jpeg_create_decompress(&cinfo);
    if (!ends_well(request->bytes, request->num_bytes, request->scan))
        refuse(&cinfo, "the scan does not end the image");
    jpeg_mem_src(&cinfo, (unsigned char *)request->bytes, (unsigned long)request->num_bytes);
    jpeg_read_header(&cinfo, TRUE);
    if (cinfo.image_width != request->full_width || cinfo.image_height != request->full_height)
        refuse(&cinfo, "the size is not the one expected");
    if (cinfo.num_components != 1 && cinfo.num_components != 3) refuse(&cinfo, "neither grey nor of three colours");
    if (cinfo.progressive_mode || jpeg_has_multiple_scans(&cinfo)) refuse(&cinfo, "more than one scan");
    cinfo.out_color_space = request->colours;
    cinfo.scale_num = 1;
    cinfo.scale_denom = request->factor;
    jpeg_start_decompress(&cinfo);
    if (cinfo.output_components != request->pixel_size) refuse(&cinfo, "another pixel size");
    if (request->left + request->width > cinfo.output_width || request->top + request->height > cinfo.output_height)
        refuse(&cinfo, "the box does not lie within the image");

    JDIMENSION first = request->left > MARGIN ? request->left - MARGIN : 0;
    JDIMENSION last = request->left + request->width + MARGIN;
    if (last > cinfo.output_width) last = cinfo.output_width;
    JDIMENSION columns = last - first;
    if (columns < cinfo.output_width) jpeg_crop_scanline(&cinfo, &first, &columns); /* moves both outwards */
    else first = 0;
    if (first > request->left || request->left - first + request->width > cinfo.output_width)
        refuse(&cinfo, "the library chose other columns");
    row = malloc((size_t)cinfo.output_width * request->pixel_size);
    if (row == NULL) refuse(&cinfo, "no memory for a row");

    if (request->top > 0 && jpeg_skip_scanlines(&cinfo, request->top) != request->top)
        refuse(&cinfo, "fewer rows than the header says");
    size_t row_size = (size_t)request->width * request->pixel_size;
    size_t skipped = (size_t)(request->left - first) * request->pixel_size;
    for (JDIMENSION y = 0; y < request->height; y++) {
        JSAMPROW into = row;
        if (jpeg_read_scanlines(&cinfo, &into, 1) != 1) refuse(&cinfo, "fewer rows than the header says");
        memcpy(request->out + (size_t)y * row_size, row + skipped, row_size);
    }
    free(row);
    jpeg_destroy_decompress(&cinfo);
    return 0;
}

PyDoc_STRVAR(decode_region_doc,
             "decode_region(data, scan, out, full_size, factor, corner)\n--\n\n"
             "Write a box of a JPEG into `out`.\n\n"
             "data: bytes-like. scan: where its only scan begins. out: C-contiguous, writable, uint8 (height, width,\n"
             "1: grey, 3: RGB or 4: RGBX). full_size: (height, width) of the file. factor: 1, 2, 4 or 8. corner: (left,\n"
             "top) of the box in px of the image decoded at that factor. Raises ValueError for what it refuses.");

static PyObject *decode_region(PyObject *module, PyObject *args) {
    Py_buffer data, out;
    PyObject *into;
    Py_ssize_t scan;
    long full_height, full_width, left, top;
    int factor;
    Request request;
    ErrorManager errors;
    (void)module;

    if (!PyArg_ParseTuple(args, "y*nO(ll)i(ll)", &data, &scan, &into, &full_height, &full_width, &factor, &left, &top))
        return NULL;
    if (PyObject_GetBuffer(into, &out, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS) != 0) {
        PyBuffer_Release(&data);
        return NULL;
    }
    const char *wrong = NULL;
    if (out.ndim != 3 || out.itemsize != 1) wrong = "out must be uint8 of three axes";
    else if (out.shape[2] != 1 && out.shape[2] != 3 && out.shape[2] != 4) wrong = "out has 1, 3 or 4 bytes a pixel";
    else if (scan < 0 || scan > data.len - 2) wrong = "the scan does not lie within the data";
    else if (full_height < 1 || full_width < 1 || full_height > JPEG_MAX_DIMENSION || full_width > JPEG_MAX_DIMENSION)
        wrong = "full_size is no size of a JPEG";
    else if (factor != 1 && factor != 2 && factor != 4 && factor != 8) wrong = "factor must be 1, 2, 4 or 8";
    else if (left < 0 || top < 0 || out.shape[0] < 1 || out.shape[1] < 1 || out.shape[0] > full_height - top ||
             out.shape[1] > full_width - left)
        wrong = "the box does not lie within the image";
    int failed = 0;
    if (wrong == NULL) {
        request.bytes = data.buf;
        request.num_bytes = (size_t)data.len;
        request.scan = (size_t)scan;
        request.full_width = (JDIMENSION)full_width;
        request.full_height = (JDIMENSION)full_height;
        request.factor = (unsigned)factor;
        request.left = (JDIMENSION)left;
        request.top = (JDIMENSION)top;
        request.height = (JDIMENSION)out.shape[0];
        request.width = (JDIMENSION)out.shape[1];
        request.pixel_size = (int)out.shape[2];
        request.colours = out.shape[2] == 1 ? JCS_GRAYSCALE : out.shape[2] == 3 ? JCS_EXT_RGB : JCS_EXT_RGBX;
        request.out = out.buf;
        Py_BEGIN_ALLOW_THREADS
        failed = decode(&request, &errors);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&data);
    if (wrong != NULL || failed) {
        PyErr_SetString(PyExc_ValueError, wrong != NULL ? wrong : errors.message);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decode_region", decode_region, METH_VARARGS, decode_region_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_jpeg_region", "Part of a JPEG; see decode_region.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__jpeg_region(void) { return PyModule_Create(&definition); }
