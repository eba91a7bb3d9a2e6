/* The random numbers of data_pipelines/streams.py, the same to the bit, as a Python type. */
#ifndef SELFSIGHT_STREAM_H
#define SELFSIGHT_STREAM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyType_Spec STREAM_SPEC;

#endif
