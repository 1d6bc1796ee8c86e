//! Servers, commands and images for the tests.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest time that any command or start may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// The volume of most tests: 8 times [`CACHE`] and [`MEMORY`].
pub(crate) const VOLUME: &str = "1G";
/// Bytes of [`VOLUME`].
pub(crate) const VOLUME_BYTES: u64 = 1 << 30;
/// The cache file.
pub(crate) const CACHE: &str = "128M";
/// Memory: not much more than two cores need at least.
pub(crate) const MEMORY: &str = "128M";

/// A directory for one test; removed when the test succeeds.
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// A new one. The name is short: the path of a Unix socket has at most 107 bytes.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("s{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory for the test");
        Self { path }
    }

    /// A path in it.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path in it, as text.
    pub(crate) fn text(&self, name: &str) -> String {
        self.at(name).to_str().expect("an ASCII path").into()
    }

    /// A file of `bytes` bytes: stretches of pseudo-random data and holes, the same for a seed.
    pub(crate) fn image(&self, name: &str, bytes: u64, seed: u64) -> String {
        const STRETCH: u64 = 1 << 20;
        let path = self.at(name);
        let file = File::create(&path).expect("an image file");
        file.set_len(bytes).expect("a sparse image file");
        let mut random = Random(seed);
        for at in (0..bytes).step_by(STRETCH as usize) {
            let dice = random.next();
            if dice % 5 > 1 {
                continue;
            }
            // Some stretches begin and end between blocks.
            let skew = if dice.is_multiple_of(2) { 0 } else { dice % 5000 };
            let len = (STRETCH - 2 * skew).min(bytes - at);
            std::os::unix::fs::FileExt::write_all_at(&file, &random.bytes(len), at + skew)
                .expect("the image is written");
        }
        path.to_str().expect("an ASCII path").into()
    }

    /// A file of that many pseudo-random bytes, without holes.
    pub(crate) fn dense(&self, name: &str, bytes: u64, seed: u64) -> String {
        fs::write(self.at(name), Random(seed).bytes(bytes)).expect("the image is written");
        self.text(name)
    }

    /// An ext4 image with this machine's documentation in it, and its size.
    pub(crate) fn ext4(&self, name: &str) -> String {
        let path = self.text(name);
        run("mkfs.ext4", &["-q", "-F", "-d", "/usr/share/doc", &path, "320M"]);
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept for inspection: {}", self.path.display());
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Numbers that depend on the seed alone (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next one.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// That many bytes.
    pub(crate) fn bytes(&mut self, len: u64) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.take(len.div_ceil(8) as usize).flatten().take(len as usize).collect()
    }
}

/// Runs a command to its end; kills it when it takes too long. It must not leave processes of other
/// sessions behind, which would not be killed, and whose output would be waited for: fio is to be
/// run with `--thread`.
pub(crate) fn output(program: &str, args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["-k", "5", &PATIENCE.as_secs().to_string(), program])
        .args(args)
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program} does not start: {e}"))
}

/// Runs a command that must succeed; what it printed on stdout.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(output.status.success(), "{program} {}\n{}", args.join(" "), said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A command that is refused, in one line that says why.
pub(crate) fn refused(site: &Site, args: &[&str], why: &str) {
    let output = site.output_on_store(args);
    let text = said(&output);
    assert!(output.status.code() == Some(1) && text.contains(why), "{}: {text}", args.join(" "));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{text}");
}

/// How many stamps a volume, or a snapshot of it, has: `cut.py` fails if that is no consistent cut.
pub(crate) fn stamps(uri: &str) -> u64 {
    python("cut.py", &["check", uri]).trim().parse().expect("a number")
}

/// Exit status and output of a command, for messages.
pub(crate) fn said(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a Python program of this directory with the system's interpreter, for which Debian packs
/// libnbd's bindings.
pub(crate) fn python(program: &str, args: &[&str]) -> String {
    run("/usr/bin/python3", &[&[script(program).as_str()], args].concat())
}

/// Where such a program is.
pub(crate) fn script(program: &str) -> String {
    format!("{}/tests/system/{program}", env!("CARGO_MANIFEST_DIR"))
}

/// Polls until it has a value.
pub(crate) fn wait<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two files have the same content; the second may be longer, if it goes on with zeroes.
pub(crate) fn assert_same(a: &str, b: &str) {
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", a, b]);
}

/// A volume begins with the content of a file. Unlike [`assert_same`] this only reads that much,
/// and asks for no allocation map.
pub(crate) fn assert_begins(uri: &str, file: &str) {
    python("begins.py", &[uri, file]);
}

/// Every file below a directory, with a hash of its content.
pub(crate) fn listing(directory: &Path) -> BTreeMap<PathBuf, u64> {
    let mut files = BTreeMap::new();
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory of the store") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let mut hasher = DefaultHasher::new();
                hasher.write(&fs::read(&path).expect("an object of the store"));
                files.insert(path, hasher.finish());
            }
        }
    }
    files
}

/// Up to two CPUs that this process may use: [`MEMORY`] is enough for two cores.
pub(crate) fn cpus() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let mut cpus = Vec::new();
    for range in list.expect("Linux").trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.parse::<u32>().expect("a CPU's number");
        cpus.extend((number(first)..=number(last)).map(|cpu| cpu.to_string()));
    }
    cpus.truncate(2);
    cpus
}

/// A TCP port that nobody uses now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// The appliance.
pub(crate) fn binary() -> String {
    std::env::var("HEELER")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../target/release/heeler").into())
}

/// A site: a data directory, and a store that other sites may share.
pub(crate) struct Site {
    /// The data directory.
    pub(crate) data: PathBuf,
    /// Flags of every command that reaches the store.
    pub(crate) store: Vec<String>,
    /// Environment of every command.
    pub(crate) env: Vec<(String, String)>,
}

impl Site {
    /// A site with its store in the data directory.
    pub(crate) fn new(scratch: &Scratch) -> Self {
        Self { data: scratch.at("a"), store: Vec::new(), env: Vec::new() }
    }

    /// Another site on the same store.
    pub(crate) fn neighbour(&self, scratch: &Scratch, name: &str) -> Self {
        let store = if self.store.is_empty() {
            vec!["--store".into(), format!("file://{}", self.store_dir().display())]
        } else {
            self.store.clone()
        };
        Self { data: scratch.at(name), store, env: self.env.clone() }
    }

    /// The directory store.
    pub(crate) fn store_dir(&self) -> PathBuf {
        self.data.join("store")
    }

    /// The cache file.
    pub(crate) fn cache(&self) -> PathBuf {
        self.data.join("cache.img")
    }

    /// A command of the appliance on this site.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["-k", "5", &PATIENCE.as_secs().to_string()]).arg(binary());
        command.args(args).arg("--data").arg(&self.data).stdin(Stdio::null());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts a command that is to be killed.
    pub(crate) fn start_doomed(&self, args: &[&str]) -> Child {
        let mut command = Command::new(binary());
        command.args(args).arg("--data").arg(&self.data).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.spawn().expect("the command starts; is it built?")
    }

    /// Runs a command that does not name the store.
    pub(crate) fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("timeout(1) starts")
    }

    /// Starts a command that does not name the store.
    pub(crate) fn start(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command.stdout(Stdio::null()).spawn().expect("timeout(1) starts")
    }

    /// Runs a command that must succeed; its stdout.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        succeeded(args, &self.output(args))
    }

    /// The same, with the flags that name the store.
    pub(crate) fn run_on_store(&self, args: &[&str]) -> String {
        succeeded(args, &self.output_on_store(args))
    }

    /// Runs a command with the flags that name the store.
    pub(crate) fn output_on_store(&self, args: &[&str]) -> Output {
        self.command(args).args(&self.store).output().expect("timeout(1) starts")
    }

    /// Runs a command with `--json`; what it printed.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let text = self.run(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}\n{text}", args.join(" ")))
    }

    /// Makes a volume of the usual size, without a server.
    pub(crate) fn make_volume(&self, name: &str) {
        self.run_on_store(&["volume", "create", name, "--size", VOLUME]);
    }

    /// Starts a server with small memory and cache, and waits until it exports `disk0`.
    pub(crate) fn serve(&self, flags: &[&str]) -> Server<'_> {
        let server = self.spawn(flags);
        server.wait_for("disk0");
        server
    }

    /// Starts a server and does not wait.
    pub(crate) fn spawn(&self, flags: &[&str]) -> Server<'_> {
        self.spawn_by(&[], flags)
    }

    /// Starts a server that must say why it cannot have a volume, and go on running.
    pub(crate) fn spawn_refused(&self) -> Server<'_> {
        let server = self.spawn(&[]);
        wait("the second server says why not", || {
            server.assert_alive();
            server.log().contains("--takeover").then_some(())
        });
        server
    }

    /// The same, by a command that ends in becoming the one behind it.
    pub(crate) fn spawn_by(&self, by: &[&str], flags: &[&str]) -> Server<'_> {
        fs::create_dir_all(&self.data).expect("the data directory");
        let port = free_port();
        let log = self.data.with_extension("log");
        let file = File::options().append(true).create(true).open(&log).expect("a log file");
        let binary = binary();
        let line = [by, &[binary.as_str()]].concat();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).arg("serve").arg("--data").arg(&self.data).args(&self.store);
        if let Ok(runtime) = std::env::var("HEELER_RUNTIME") {
            command.args(["--runtime", &runtime]);
        }
        let cores = cpus().join(",");
        for (flag, value) in [("--memory", MEMORY), ("--cache-size", CACHE), ("--cores", &cores)] {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        let socket = self.data.join("nbd.sock");
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        command.args(["--listen", &format!("tcp:127.0.0.1:{port}")]).args(flags);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a second handle"));
        let process = command.stderr(file).spawn().expect("the server starts; is it built?");
        Server { site: self, process, log, socket, port }
    }
}

fn succeeded(args: &[&str], output: &Output) -> String {
    assert!(output.status.success(), "heeler {}\n{}", args.join(" "), said(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running server; killed when dropped.
pub(crate) struct Server<'a> {
    site: &'a Site,
    process: Child,
    log: PathBuf,
    socket: PathBuf,
    port: u16,
}

impl Server<'_> {
    /// The number of its process.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The site it serves.
    pub(crate) fn site(&self) -> &Site {
        self.site
    }

    /// Waits until a volume can be opened.
    pub(crate) fn wait_for(&self, volume: &str) {
        wait(&format!("{volume} is exported; {}", self.site.data.display()), || {
            self.assert_alive();
            self.exports(volume).then_some(())
        });
    }

    /// Whether a client can open the volume now.
    pub(crate) fn exports(&self, volume: &str) -> bool {
        output("nbdinfo", &["--size", &self.uri(volume)]).status.success()
    }

    /// Fails if the server has ended.
    pub(crate) fn assert_alive(&self) {
        let ended = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))
            .map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, s)| s.starts_with('Z')));
        assert!(!ended, "the server has ended:\n{}", self.log());
    }

    /// A volume over the Unix socket.
    pub(crate) fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.socket.display())
    }

    /// A volume over TCP.
    pub(crate) fn tcp_uri(&self, volume: &str) -> String {
        format!("nbd://127.0.0.1:{}/{volume}", self.port)
    }

    /// The Unix socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Everything that the site's servers have printed so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("it runs");
        let status = self.process.wait().expect("it ends");
        assert_eq!(status.signal(), Some(9), "it had ended before:\n{}", self.log());
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        run("kill", &["-TERM", &self.process.id().to_string()]);
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn stop(mut self) {
        self.terminate();
        let status = self.ended();
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Waits until it ends by itself.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let log = self.log.clone();
        wait(&format!("the server ends; {}", log.display()), || {
            self.process.try_wait().expect("its status")
        })
    }

    /// Pushes a volume.
    pub(crate) fn push(&self, volume: &str) {
        self.site.run(&["volume", "push", volume]);
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = self.log();
            let from = log.char_indices().rev().nth(20_000).map_or(0, |(at, _)| at);
            eprintln!("--- {}\n{}---", self.log.display(), &log[from..]);
        }
    }
}
