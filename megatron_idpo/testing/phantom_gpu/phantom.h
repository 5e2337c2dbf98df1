/* Counters that the stand-in's libraries share; `counters.py` reads them. */
#ifndef PHANTOM_H
#define PHANTOM_H

/* In the order of `counters.NAMES`. */
struct phantom_counts {
  unsigned long launches;       /* kernels, without matrix products */
  unsigned long gemms;          /* matrix products through cuBLAS */
  unsigned long syncs;          /* calls in which the host waits for the device */
  unsigned long to_host;        /* copies, and their bytes */
  unsigned long to_host_bytes;
  unsigned long to_device;
  unsigned long to_device_bytes;
  unsigned long pageable;       /* copies whose host side is not pinned: the host takes part in them */
  unsigned long allocations;    /* cudaMalloc */
};

extern struct phantom_counts phantom_counts;

#define PHANTOM_ADD(field, amount) \
  __atomic_add_fetch(&phantom_counts.field, (amount), __ATOMIC_RELAXED)

#endif
