/* CHECK counts what is not true and says where; a test's main returns report(). */
#ifndef WSN_TESTS_CHECK_H
#define WSN_TESTS_CHECK_H

#include <stdio.h>

static int failures = 0;

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) {                                                \
      printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                      \
    }                                                                  \
  } while (0)

static int report(void) { return failures != 0; }

#endif
