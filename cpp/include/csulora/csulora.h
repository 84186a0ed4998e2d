#pragma once

/// Everything that csulora's core offers: extraction of subspaces, correction of updates, and the errors of both.
#include "csulora/correct.h"
#include "csulora/error.h"
#include "csulora/extract.h"
#include "csulora/subspace.h"
