//! A script that writes until it is told to stop, and says how far it is.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use crate::rig::script;

/// It runs; killed when dropped.
pub(crate) struct Writer {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    /// Starts it. It is the process itself that is started, and not something that runs it, so that
    /// none is left when it is killed. It ends by itself when it takes too long.
    pub(crate) fn start(program: &str, args: &[&str]) -> Self {
        let mut process = Command::new("/usr/bin/python3")
            .arg(script(program))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        Self { process, lines }
    }

    /// Waits for this many more hundreds of acknowledged requests.
    pub(crate) fn wait_for_hundreds(&mut self, hundreds: usize) {
        for _ in 0..hundreds {
            let line = self.lines.next().expect("the writer goes on").expect("a line of text");
            assert!(line.starts_with("acked "), "{line}");
        }
    }

    /// Waits until it says this word.
    pub(crate) fn wait_for(&mut self, word: &str) {
        let said = self.lines.by_ref().any(|line| line.expect("a line of text") == word);
        assert!(said, "the writer goes on");
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> ExitStatus {
        // Drained so that a line on its way cannot block the writer.
        self.lines.by_ref().for_each(drop);
        self.process.wait().expect("the writer ends")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
