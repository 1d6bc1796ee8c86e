//! The command line.

mod admin;
pub(crate) mod snapshot;
mod transfer;

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use heeler_core::event::Mode;
use heeler_core::policy::Policy;
use heeler_replay::{CacheSize, SizeError};

pub(crate) use self::admin::{ObjectArgs, RangeArgs, RenameArgs, ResizeArgs};
use self::snapshot::{CloneArgs, SnapshotCommand};
pub(crate) use self::transfer::{ExportArgs, ImportArgs};
use crate::runtime::Runtime;
use crate::setting::{Setting, Switch, parse_mode};
use crate::settings::Listen;
use crate::size::{Memory, Size};
use crate::span::PushAfter;

/// A write-back cache for virtual disks: NBD in front, RAM and NVMe between, an object store
/// behind.
#[derive(Debug, Parser)]
#[command(name = "heeler", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Where the server keeps its files [default: ./heeler-data]
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) data: Option<PathBuf>,
    /// Settings from a TOML file; flags on the command line win
    #[arg(long, value_name = "FILE.toml", global = true)]
    pub(crate) config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve volumes until SIGTERM or SIGINT
    Serve(ServeArgs),
    /// Make, list, inspect, delete, push, set, scrub, attach, detach, import or export volumes
    Volume {
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Make, list, delete or serve snapshots, or go back to one
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Make a volume with the content of a snapshot, at once
    Clone(CloneArgs),
    /// Inspect, flush or purge the cache of the running server
    Cache {
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Show what the running server does
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the cache file and the volumes in the store; exit 1 if something is wrong
    Check(CheckArgs),
    /// Replay traces through the cache: its hit ratio beside LRU and the best possible
    #[command(after_long_help = TRACES)]
    Replay(ReplayArgs),
}

/// What `replay` reads.
const TRACES: &str = "\
A trace is a file of one of these kinds, known by the end of its name; .zst after it means that it \
is compressed by zstd.

.btr  Records of 24 bytes, little endian: u64 time (not used), u64 byte offset, u32 length in \
bytes, u8 operation (0 read, 1 write, 2 unknown), u8 flags (not used), u16 volume.

.csv  Comma-separated, the first line with the names of the columns, in any order and case: \
offset and length in bytes; op (r, read, w, write, u or unknown, in any case); volume, if there \
are several (any text). Other columns, such as timestamp, are not used.

Requests are replayed in the order of the file. Each is taken as the 4 KiB blocks it touches, in \
ascending order; reads and writes count alike, unknown operations as reads, and every missing \
block is brought in. Volumes have address spaces of their own. The cache starts empty.";

/// Of `serve`.
#[derive(Args, Debug, Default)]
pub(crate) struct ServeArgs {
    /// Cache file or block device, made and formatted if missing [default: DATA/cache.img]
    #[arg(long, value_name = "PATH")]
    pub(crate) cache: Option<PathBuf>,
    /// Size of a cache file that has to be made [default: 4G]
    #[arg(long, value_name = "SIZE")]
    pub(crate) cache_size: Option<Size>,
    /// Shard regions of a cache that has to be formatted [default: 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) shards: Option<u16>,
    /// Memory that the server takes, or its share of what it may have; `cache resize` changes it
    /// [default: 1G, or 80% if that is less]
    #[arg(long, value_name = "SIZE|N%")]
    pub(crate) memory: Option<Memory>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Where NBD clients connect; may be given several times
    /// [default: unix:DATA/nbd.sock and tcp:127.0.0.1:10809]
    #[arg(long, value_name = "unix:PATH|tcp:HOST:PORT")]
    pub(crate) listen: Vec<Listen>,
    /// CPUs that serve, such as 0-3,8 [default: all usable]
    #[arg(long, value_name = "LIST")]
    pub(crate) cores: Option<String>,
    /// What owns sockets, timers and sleep on these CPUs [default: monoio]
    #[arg(long, value_name = "RUNTIME", hide_possible_values = true)]
    pub(crate) runtime: Option<Runtime>,
    /// By which data leaves RAM [default: reuse]
    #[arg(long, value_name = "POLICY", value_parser = policies())]
    pub(crate) policy: Option<Policy>,
    /// When a push starts at the latest after the first write that it holds; it then has as long
    /// again, unless room is short or somebody waits for it [default: 5s]
    #[arg(long, value_name = "TIME")]
    pub(crate) push_after: Option<PushAfter>,
    /// Take volumes whose owner has not released them: for an owner that is lost for ever. What it
    /// had not pushed is not in the volume, and what this cache holds of it is given up
    #[arg(long)]
    pub(crate) takeover: bool,
}

/// Where the store is.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct StoreArgs {
    /// Object store: file:///DIR, s3://BUCKET/PREFIX or memory:// [default: file://DATA/store]
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
    /// Use a store that does not honour create-if-absent. Then nothing keeps a second server from
    /// the same volumes, and two would destroy them
    #[arg(long)]
    pub(crate) single_writer_unsafe: bool,
}

/// Of `volume`.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make an empty volume
    Create {
        /// Letters, digits, '.', '_' and '-'
        name: String,
        /// Size of the disk
        #[arg(long)]
        size: Size,
        /// The unit in which it is spread over shards: a power of two, 64K to 4M
        #[arg(long, value_name = "SIZE", default_value = "4M")]
        object_size: Size,
        /// When a write is acknowledged, and what is kept: writeback, ram, writethrough,
        /// writearound, none or ephemeral
        #[arg(long, default_value = "writeback", value_parser = parse_mode)]
        mode: Mode,
        /// Whether what was read stays in RAM
        #[arg(long, value_name = "on|off", default_value = "on", hide_possible_values = true)]
        buffered_read: Switch,
        /// Whether what was written stays in RAM
        #[arg(long, value_name = "on|off", default_value = "on", hide_possible_values = true)]
        buffered_write: Switch,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// List the volumes of the store
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// With tags and descriptions
        #[arg(long)]
        long: bool,
        /// Only those with this tag
        #[arg(long)]
        tag: Option<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Copy what a clone shares with its parent, so that it needs the parent no more
    Flatten {
        /// Which
        name: String,
    },
    /// Show volumes, their snapshots, and the clones of these
    Tree {
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Show what is known of a volume
    Info {
        /// Which
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Delete a volume and all its data
    Delete {
        /// Which
        name: String,
        /// Also if it is in use, dirty, broken, another server's, or has snapshots
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Push everything dirty to the store and commit it
    Push {
        /// Which
        name: String,
    },
    /// Change when writes are acknowledged, what is kept, who may write, and what is said of it,
    /// also while clients are at work
    Set {
        /// Which
        name: String,
        /// What: mode=MODE, buffered-read=on|off, buffered-write=on|off, read-only=yes|no,
        /// description=TEXT, tags=A,B, tag+=A, tag-=A
        #[arg(required = true, value_name = "NAME=VALUE")]
        settings: Vec<Setting>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Change the size of a volume, also while clients are at work. NBD has no way to tell them: a
    /// client sees it when it connects again
    Resize(ResizeArgs),
    /// Give a volume another name. Clients keep it, and use the new name when they connect again
    Rename(RenameArgs),
    /// Copy a disk from a file or an NBD server into a volume, which is made
    Import(ImportArgs),
    /// Copy a volume to a file or an NBD server
    Export(ExportArgs),
    /// Copy a part of a volume, or of a snapshot, to standard output
    Read(RangeArgs),
    /// Write standard input into a volume
    Write(RangeArgs),
    /// Show where the store has the blocks of an object
    Object(ObjectArgs),
    /// Claim a volume of the store and serve it
    Attach {
        /// Which
        name: String,
        /// Also if its owner has not released it, or this cache holds older dirty data of it: that,
        /// and what its owner had not pushed, will not be in it
        #[arg(long)]
        takeover: bool,
    },
    /// Push what is dirty, disconnect clients and give the volume up, for another server to attach
    Detach {
        /// Which
        name: String,
        /// Call off a detach that is under way: the volume goes on being served
        #[arg(long)]
        cancel: bool,
    },
    /// Save what the cache holds of a volume that was lost to another server before it was pushed:
    /// a sparse raw image of the dirty blocks, and the list of them in FILE.map
    Salvage {
        /// Which
        name: String,
        /// The image, which must not exist
        file: PathBuf,
    },
    /// Drop what the cache holds of a volume that is not served
    Forget {
        /// Which
        name: String,
        /// Dirty data too: it is lost
        #[arg(long)]
        force: bool,
    },
    /// Read everything that the cache device holds of a served volume, compare it with its
    /// checksums, and repair what is damaged from RAM or the store
    Scrub {
        /// Which
        name: String,
    },
}

/// Of `cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// Show what is in the cache, and what happened in the last 10 s, the last 5 min and since the
    /// start
    Info {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Only this volume
        #[arg(long, value_name = "NAME")]
        volume: Option<String>,
        /// Only this shard
        #[arg(long, value_name = "N")]
        shard: Option<u16>,
    },
    /// Change the memory that the server takes, while it runs
    Resize {
        /// As for `serve --memory`
        #[arg(value_name = "SIZE|N%")]
        memory: Memory,
    },
    /// Push every volume
    Flush,
    /// Switch the policy by which data leaves RAM; nothing is dropped for it
    Policy {
        /// Which
        #[arg(value_parser = policies())]
        policy: Policy,
    },
    /// Drop what is cached; refused while anything is dirty
    Purge {
        /// Dirty data too: it is lost
        #[arg(long)]
        force: bool,
    },
}

/// Of `check`.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// Volumes to check in the store [default: all]
    pub(crate) volumes: Vec<String>,
    /// Read every block of the volumes and compare it with its checksum
    #[arg(long)]
    pub(crate) deep: bool,
    /// Cache file or block device [default: DATA/cache.img]
    #[arg(long, value_name = "PATH")]
    pub(crate) cache: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

/// Of `replay`.
#[derive(Args, Debug)]
pub(crate) struct ReplayArgs {
    /// Recordings: NAME.btr or NAME.csv, with .zst if compressed
    #[arg(required = true, value_name = "TRACE")]
    pub(crate) traces: Vec<PathBuf>,
    /// Policies to compare, beside lru [default: all]
    #[arg(long, value_name = "POLICY,...", value_delimiter = ',', value_parser = policies())]
    pub(crate) policy: Vec<Policy>,
    /// Cache sizes: shares of the blocks that a trace touches, or bytes
    #[arg(long, value_name = "1%|64M,...", value_delimiter = ',', default_value = "1%,5%,10%,20%")]
    pub(crate) size: Vec<ReplaySize>,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Draw the curves of hit ratio by size into a file
    #[arg(long, value_name = "OUT.svg")]
    pub(crate) svg: Option<PathBuf>,
}

fn policies() -> impl TypedValueParser<Value = Policy> {
    PossibleValuesParser::new(Policy::ALL.iter().map(|policy| policy.name()))
        .map(|name| Policy::from_name(&name).expect("one of these"))
}

/// A size as it was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ReplaySize {
    pub(crate) text: String,
    pub(crate) size: CacheSize,
}

impl FromStr for ReplaySize {
    type Err = String;

    /// A percentage, or a size like `64M`.
    fn from_str(text: &str) -> Result<Self, String> {
        let size = match text.strip_suffix('%') {
            Some(percent) => CacheSize::percent(percent),
            None => text
                .parse()
                .map_err(|_| SizeError::NoNumber)
                .and_then(|Size(bytes)| CacheSize::bytes(bytes)),
        };
        let size = size.map_err(|e| e.to_string())?;
        Ok(Self { text: text.into(), size })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_takes_everything_and_nothing() {
        let Command::Serve(args) = parse("heeler serve").unwrap().command else { panic!() };
        assert!(args.listen.is_empty() && args.cache.is_none() && !args.takeover);
        let cli = parse(
            "heeler serve --data /d --cache /dev/nvme0n1 --cache-size 8G --memory 512M --store \
             s3://b/p --listen unix:/a.sock --listen tcp:[::1]:10810 --cores 0-3,8 --config \
             h.toml --takeover",
        );
        let cli = cli.unwrap();
        assert_eq!(cli.data, Some("/d".into()));
        assert_eq!(cli.config, Some("h.toml".into()));
        let Command::Serve(args) = cli.command else { panic!() };
        assert_eq!(
            (args.cache_size, args.memory),
            (Some(Size(8 << 30)), Some(Memory::Bytes(Size(512 << 20))))
        );
        assert_eq!(
            args.listen,
            [Listen::Unix("/a.sock".into()), Listen::Tcp("[::1]:10810".into())]
        );
        assert_eq!(args.store.store.as_deref(), Some("s3://b/p"));
        assert_eq!(args.cores.as_deref(), Some("0-3,8"));
        assert!(args.takeover);
    }

    #[test]
    fn the_data_directory_comes_before_or_after() {
        for line in ["heeler --data /d volume list", "heeler volume list --data /d --json"] {
            assert_eq!(parse(line).unwrap().data, Some("/d".into()));
        }
    }

    #[test]
    fn volumes_are_made() {
        let cli = parse("heeler volume create disk1 --size 16G").unwrap();
        let Command::Volume { command: VolumeCommand::Create { name, size, object_size, .. } } =
            cli.command
        else {
            panic!()
        };
        assert_eq!((name.as_str(), size, object_size), ("disk1", Size(16 << 30), Size(4 << 20)));
        let error = parse("heeler volume create disk1").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn replays_have_lists_of_policies_and_sizes() {
        let of = |line| match parse(line).unwrap().command {
            Command::Replay(args) => args,
            other => panic!("{other:?}"),
        };
        let args = of("heeler replay a.btr b.csv --policy 2q,s3fifo --size 0.5%,64M --json");
        assert_eq!(args.traces.len(), 2);
        assert_eq!(args.policy, [Policy::TwoQ, Policy::S3Fifo]);
        let sizes: Vec<_> = args.size.iter().map(|size| size.size).collect();
        assert_eq!(sizes, [CacheSize::Share(5_000), CacheSize::Bytes(64 << 20)]);
        let args = of("heeler replay a.btr");
        let sizes: Vec<_> = args.size.iter().map(|size| size.text.as_str()).collect();
        assert_eq!(sizes, ["1%", "5%", "10%", "20%"]);
        assert!(args.policy.is_empty(), "all of them");
    }

    #[test]
    fn an_unknown_policy_is_told_the_choices() {
        let text = parse("heeler replay a.btr --policy mru").unwrap_err().to_string();
        for policy in Policy::ALL {
            assert!(text.contains(policy.name()), "{text}");
        }
    }

    #[test]
    fn volumes_are_set() {
        let line = "heeler volume set web buffered-write=off mode=ram buffered-read=on";
        let cli = parse(line).unwrap();
        let Command::Volume { command: VolumeCommand::Set { name, settings, .. } } = cli.command
        else {
            panic!()
        };
        assert_eq!(name, "web");
        let (write, read) = (Setting::BufferedWrite(false), Setting::BufferedRead(true));
        assert_eq!(settings, [write, Setting::Mode(Mode::Ram), read]);
        let cli = parse("heeler volume create web --size 1G --buffered-write off").unwrap();
        let Command::Volume {
            command: VolumeCommand::Create { mode, buffered_read, buffered_write, .. },
        } = cli.command
        else {
            panic!()
        };
        assert_eq!(
            (mode, buffered_read, buffered_write),
            (Mode::WriteBack, Switch::On, Switch::Off)
        );
    }

    #[test]
    fn usage_errors_exit_with_2() {
        for line in [
            "heeler volume set web",
            "heeler volume set web size=on",
            "heeler volume set web buffered-write=maybe",
            "heeler volume set web mode=safe",
            "heeler volume create web --size 1G --buffered-read maybe",
            "heeler volume create web --size 1G --mode safe",
            "heeler",
            "heeler serve --listen 10809",
            "heeler serve --memory lots",
            "heeler cache drop",
            "heeler cache info --shard all",
            "heeler volume delete",
            "heeler volume import a.raw",
            "heeler volume import s3://bucket/a web",
            "heeler volume import a.raw web --force --resume",
            "heeler volume export web",
            "heeler volume export web nbd+unix:///x",
            "heeler replay",
            "heeler replay a.btr --policy mru",
            "heeler replay a.btr --policy lru,",
            "heeler replay a.btr --size 0%",
            "heeler replay a.btr --size 101%",
            "heeler replay a.btr --size 1%,0",
            "heeler replay a.btr --size 5%%",
            "heeler replay a.btr --size much",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
