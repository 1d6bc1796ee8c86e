//! The appliance with real clients: `nbdinfo`, `nbdcopy`, `qemu-img`, `qemu-io`, `fio` and libnbd's
//! Python bindings, over a directory store and over an S3 server on loopback; and with other NBD
//! servers: `qemu-nbd` and `nbdkit`.
//!
//! Each test starts servers of its own in a directory of its own, waits for what it can see (a
//! socket that answers, a line of output) and never for a time to pass. When a test fails, its
//! servers' logs are printed and its directory is kept.
//!
//! `HEELER` names the binary (default: `target/release/heeler`), `HEELER_MOTO` the S3 server
//! (default: `moto_server`), `HEELER_RGW` Ceph's gateway (default: none, and its test does
//! nothing), `HEELER_RUNTIME` what the servers run on (default: theirs). `make test` sets them.
#![cfg(not(loom))]

mod admin;
mod clients;
mod damage;
mod deltas;
mod durability;
mod hammer;
mod handover;
mod manage;
mod memory;
mod modes;
mod outage;
mod ownership;
mod pushes;
mod rig;
mod s3;
mod snapshots;
mod stores;
mod transfer;
mod writer;
