#include "body.h"

extern const Table portable_table = STROP_TABLE;
