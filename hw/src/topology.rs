//! Processors and memory that this process may use.

use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::path::Path;

/// CPU numbers that a `cpu_set_t` can name.
const CPUS_MAX: u32 = libc::CPU_SETSIZE as u32;

/// Why a list of cores could not be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CoreListError {
    /// This part is neither a number nor `first-last`.
    Malformed(String),
    /// The number is larger than any CPU's.
    TooLarge(u32),
    /// The CPU is named twice.
    Twice(u32),
    /// No CPU is named.
    Empty,
}

impl fmt::Display for CoreListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(part) => write!(f, "\"{part}\" is neither a CPU nor a range of CPUs"),
            Self::TooLarge(cpu) => write!(f, "there is no CPU {cpu}"),
            Self::Twice(cpu) => write!(f, "CPU {cpu} is named twice"),
            Self::Empty => write!(f, "no CPU is named"),
        }
    }
}

impl std::error::Error for CoreListError {}

/// Reads a list of CPU numbers such as `0-3,8`, in the order given.
///
/// # Errors
/// [`CoreListError`].
pub fn parse_core_list(text: &str) -> Result<Vec<u32>, CoreListError> {
    if text.trim().is_empty() {
        return Err(CoreListError::Empty);
    }
    let mut cpus = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<u32>();
        let (Ok(first), Ok(last)) = (number(first), number(last)) else {
            return Err(CoreListError::Malformed(part.into()));
        };
        if first > last {
            return Err(CoreListError::Malformed(part.into()));
        }
        if last >= CPUS_MAX {
            return Err(CoreListError::TooLarge(last));
        }
        for cpu in first..=last {
            if cpus.contains(&cpu) {
                return Err(CoreListError::Twice(cpu));
            }
            cpus.push(cpu);
        }
    }
    Ok(cpus)
}

/// The CPUs on which this thread may run, ascending: those online, less what a container or
/// taskset took away.
///
/// # Errors
/// What the kernel says.
pub fn usable_cpus() -> io::Result<Vec<u32>> {
    // SAFETY: a `cpu_set_t` is an array of integers, for which zeroes are a value.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills the set, whose size is given; 0 is this thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: every number tested is below the size of the set.
    Ok((0..CPUS_MAX).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu as usize, &set) }).collect())
}

/// Binds this thread to one CPU.
///
/// # Errors
/// `InvalidInput` where the CPU does not exist, is offline or is not ours to use.
pub fn pin_to_cpu(cpu: u32) -> io::Result<()> {
    if cpu >= CPUS_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: as in `usable_cpus`.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the number is below the size of the set.
    unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    // SAFETY: the kernel reads the set, whose size is given; 0 is this thread.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets whoever wakes up have this thread's processor soon: a thread that has run for 100 us gives
/// it up, instead of after milliseconds, and gets it back at once when it wakes up itself. Linux
/// before 6.12 has no such slices and only does what follows. The thread is `nicer` than it was by
/// so much, as by nice(2).
///
/// # Errors
/// What the kernel says.
pub fn share_soon(nicer: i32) -> io::Result<()> {
    const SLICE_NANOS: u64 = 100_000;
    const SIZE: libc::c_uint = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: a `sched_attr` is a few integers, for which zeroes are values.
    let mut attr: libc::sched_attr = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills the attributes, whose size is given; 0 is this thread.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SIZE, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    attr.sched_nice = (attr.sched_nice + nicer).min(19);
    attr.sched_runtime = SLICE_NANOS;
    // SAFETY: the kernel reads the attributes, which say their size themselves; 0 is this thread.
    if unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Bytes of memory that this process may use: the machine's, or less where a cgroup (of either
/// version) says so.
///
/// # Errors
/// The machine's memory could not be read.
pub fn memory_limit() -> io::Result<u64> {
    let total = total_memory(&fs::read_to_string("/proc/meminfo")?).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "no MemTotal in /proc/meminfo")
    })?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = cgroup_limit(Path::new("/sys/fs/cgroup"), &groups);
    Ok(limit.map_or(total, |limit| limit.min(total)))
}

/// Bytes of memory that this process takes now.
///
/// # Errors
/// The system does not say.
pub fn resident_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    field(&text, "VmRSS:")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no VmRSS in /proc/self/status"))
}

fn total_memory(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemTotal:")
}

/// Bytes of a line such as `VmRSS: 16 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The least limit of the groups in `groups` (the text of /proc/self/cgroup) and all above them.
/// Inside a container a group's path may lead nowhere; the groups above it, up to the mount, count
/// all the same.
fn cgroup_limit(mount: &Path, groups: &str) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (roots, file): (&[&str], _) = if controllers.is_empty() {
            (&["", "unified"], "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            (&["memory"], "memory.limit_in_bytes")
        } else {
            continue;
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            for root in roots {
                let value = fs::read_to_string(mount.join(root).join(group).join(file));
                // "max" is no number, and no limit.
                let value = value.ok().and_then(|text| text.trim().parse::<u64>().ok());
                least = least.into_iter().chain(value).min();
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_shares_soon_is_as_nice_as_it_was_told() {
        let nice = || {
            let stat = fs::read_to_string("/proc/thread-self/stat").expect("Linux");
            let fields = stat.rsplit_once(") ").expect("Linux").1;
            fields.split(' ').nth(16).expect("Linux").parse::<i32>().expect("a number")
        };
        let sharing = std::thread::spawn(move || {
            let before = nice();
            share_soon(0).expect("nobody is asked for more");
            assert_eq!(nice(), before);
            share_soon(3).expect("anybody may be nicer");
            assert_eq!(nice(), (before + 3).min(19));
        });
        sharing.join().expect("no panic");
    }

    #[test]
    fn core_lists() {
        assert_eq!(parse_core_list("0-3,8"), Ok(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_core_list(" 5 , 1-1 "), Ok(vec![5, 1]));
        assert_eq!(parse_core_list(""), Err(CoreListError::Empty));
        for part in ["a", "3-1", "1-", "-1", "1-2-3"] {
            assert_eq!(parse_core_list(part), Err(CoreListError::Malformed(part.into())));
        }
        assert_eq!(parse_core_list("0,,1"), Err(CoreListError::Malformed(String::new())));
        assert_eq!(parse_core_list("0-2,1"), Err(CoreListError::Twice(1)));
        assert_eq!(parse_core_list("0-4000000000"), Err(CoreListError::TooLarge(4_000_000_000)));
    }

    #[test]
    fn a_pinned_thread_stays_on_its_cpu() {
        // A thread of its own: the pin lasts as long as the thread.
        std::thread::spawn(|| {
            let cpu = *usable_cpus().unwrap().last().unwrap();
            pin_to_cpu(cpu).unwrap();
            assert_eq!(usable_cpus().unwrap(), [cpu]);
        })
        .join()
        .unwrap();
        assert!(pin_to_cpu(CPUS_MAX).is_err());
        assert!(pin_to_cpu(CPUS_MAX - 1).is_err(), "such a machine is not expected here");
    }

    #[test]
    fn the_least_limit_of_all_groups_above_counts() {
        let mount = std::env::temp_dir().join(format!("heeler-hw-cgroup-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = mount.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("a/memory.max", "5000\n");
        put("a/b/memory.max", "max\n");
        put("memory/memory.limit_in_bytes", "9223372036854771712\n");
        put("memory/x/memory.limit_in_bytes", "7000\n");
        assert_eq!(cgroup_limit(&mount, "0::/a/b\n"), Some(5000));
        assert_eq!(cgroup_limit(&mount, "0::/gone/away\n"), None);
        assert_eq!(cgroup_limit(&mount, "3:cpu:/a\n8:rdma,memory:/x\n"), Some(7000));
        assert_eq!(cgroup_limit(&mount, "8:memory:/x\n0::/a/b\n"), Some(5000));
        assert_eq!(cgroup_limit(&mount, "nonsense\n"), None);
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn memory_of_this_machine() {
        assert_eq!(total_memory("MemFree: 1 kB\nMemTotal:       16 kB\n"), Some(16384));
        assert_eq!(total_memory("MemTotal: x kB\n"), None);
        assert!(memory_limit().unwrap() > 1 << 20);
        assert!((1 << 16..memory_limit().unwrap()).contains(&resident_memory().unwrap()));
    }
}
