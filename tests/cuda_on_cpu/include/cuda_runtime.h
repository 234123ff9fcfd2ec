// cuda_on_cpu.h has it all.
#pragma once
