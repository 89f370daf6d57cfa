// Lists of accumulators for the asm statements of wgmma*.h. Device code only.
#pragma once

// Eight operands: c[i] to c[i + 7], by constraint.
#define NIBBLE_C8(constraint, i)                                                      \
  constraint(c[i]), constraint(c[i + 1]), constraint(c[i + 2]), constraint(c[i + 3]), \
      constraint(c[i + 4]), constraint(c[i + 5]), constraint(c[i + 6]), constraint(c[i + 7])
#define NIBBLE_C16(constraint, i) NIBBLE_C8(constraint, i), NIBBLE_C8(constraint, i + 8)
#define NIBBLE_C32(constraint) NIBBLE_C16(constraint, 0), NIBBLE_C16(constraint, 16)
#define NIBBLE_C48(constraint) NIBBLE_C32(constraint), NIBBLE_C16(constraint, 32)
#define NIBBLE_C64(constraint) NIBBLE_C48(constraint), NIBBLE_C16(constraint, 48)
#define NIBBLE_C80(constraint) NIBBLE_C64(constraint), NIBBLE_C16(constraint, 64)
#define NIBBLE_C88(constraint) \
  NIBBLE_C64(constraint), NIBBLE_C16(constraint, 64), NIBBLE_C8(constraint, 80)
#define NIBBLE_C96(constraint) NIBBLE_C88(constraint), NIBBLE_C8(constraint, 88)

// Their numbers, operands 0 and following.
#define NIBBLE_N16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NIBBLE_N32 \
  NIBBLE_N16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NIBBLE_N48 \
  NIBBLE_N32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NIBBLE_N64 \
  NIBBLE_N48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NIBBLE_N80 \
  NIBBLE_N64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NIBBLE_N88                                                                   \
  NIBBLE_N64                                                                         \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NIBBLE_N96 NIBBLE_N88 ", %88, %89, %90, %91, %92, %93, %94, %95"
