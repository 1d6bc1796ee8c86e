//! The writer that knows what a crash may leave behind: `hammer.py`.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::rig::{Scratch, python, script};

/// Its memory of what it wrote, in a file.
pub(crate) struct Hammer {
    state: String,
}

/// A run.
pub(crate) struct Running {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    mark: String,
}

impl Hammer {
    /// One that has written nothing yet.
    pub(crate) fn new(scratch: &Scratch) -> Self {
        Self { state: scratch.text("hammer.json") }
    }

    /// Writes until the connection breaks.
    pub(crate) fn start(&self, uri: &str, seed: u64) -> Running {
        let mut process = Command::new("timeout")
            .args(["120", "/usr/bin/python3", &script("hammer.py"), "run", uri, &self.state])
            .arg(seed.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        Running { process, lines, mark: format!("{}.mark", self.state) }
    }

    /// Every acknowledged write is there, and nothing that was never written.
    pub(crate) fn check(&self, uri: &str) {
        python("hammer.py", &["check", uri, &self.state]);
    }
}

impl Running {
    /// Waits for this many more hundreds of acknowledged requests.
    pub(crate) fn wait_for_hundreds(&mut self, hundreds: usize) {
        for _ in 0..hundreds {
            let line = self.lines.next().expect("the writer goes on").expect("a line of text");
            assert!(line.starts_with("acked "), "{line}");
        }
    }

    /// What it gets acknowledged from now on may be lost.
    pub(crate) fn mark(&mut self) {
        std::fs::write(&self.mark, "").expect("the writer's directory");
        let marked = self.lines.by_ref().any(|line| line.expect("a line of text") == "marked");
        assert!(marked, "the writer goes on");
    }

    /// Waits for its end, after the server's. It fails if a request failed before.
    pub(crate) fn end(mut self) {
        // Drained so that a line on its way cannot block the writer.
        self.lines.by_ref().for_each(drop);
        let status = self.process.wait().expect("the writer ends");
        assert!(status.success(), "the writer: {status}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
