//! The writer that knows what a crash may leave behind: `hammer.py`.

use crate::rig::{Scratch, python};
use crate::writer::Writer;

/// Its memory of what it wrote, in a file.
pub(crate) struct Hammer {
    state: String,
}

/// A run.
pub(crate) struct Running {
    writer: Writer,
    mark: String,
}

impl Hammer {
    /// One that has written nothing yet.
    pub(crate) fn new(scratch: &Scratch) -> Self {
        Self { state: scratch.text("hammer.json") }
    }

    /// Writes until the connection breaks.
    pub(crate) fn start(&self, uri: &str, seed: u64) -> Running {
        let writer = Writer::start("hammer.py", &["run", uri, &self.state, &seed.to_string()]);
        Running { writer, mark: format!("{}.mark", self.state) }
    }

    /// Every acknowledged write is there, and nothing that was never written.
    pub(crate) fn check(&self, uri: &str) {
        python("hammer.py", &["check", uri, &self.state]);
    }
}

impl Running {
    /// Waits for this many more hundreds of acknowledged requests.
    pub(crate) fn wait_for_hundreds(&mut self, hundreds: usize) {
        self.writer.wait_for_hundreds(hundreds);
    }

    /// What it gets acknowledged from now on may be lost.
    pub(crate) fn mark(&mut self) {
        std::fs::write(&self.mark, "").expect("the writer's directory");
        self.writer.wait_for("marked");
    }

    /// Waits for its end, after the server's. It fails if a request failed before.
    pub(crate) fn end(self) {
        let status = self.writer.end();
        assert!(status.success(), "the writer: {status}");
    }
}
