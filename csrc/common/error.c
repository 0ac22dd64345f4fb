/* lf_fail: fills the caller's error. No globals, so any number of threads may fail at once. */
#include "../lightforcing.h"
#include <stdarg.h>
#include <stdio.h>

int lf_fail(lf_error *err, lf_error_kind kind, const char *format, ...)
{
    va_list values;

    err->kind = kind;
    va_start(values, format);
    vsnprintf(err->text, sizeof err->text, format, values);
    va_end(values);
    return -1;
}
