// All that a translated kernel includes.
#pragma once

#include "conversions.h"
#include "floats.h"
#include "halves.h"
#include "integers.h"
#include "thread.h"
#include "types.h"
