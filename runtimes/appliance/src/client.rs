//! The other end of the admin socket: for the commands.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::api::{Answer, Request};

/// Name of the socket in the data directory.
pub(crate) const SOCKET: &str = "admin.sock";

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    stream: UnixStream,
}

impl Server {
    /// Connects; `None` if no server runs on this data directory.
    pub(crate) fn find(data: &Path) -> Result<Option<Self>, String> {
        let path = data.join(SOCKET);
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Some(Self { stream })),
            Err(e) if gone(&e) => Ok(None),
            Err(e) => Err(format!("the server's socket {}: {e}", path.display())),
        }
    }

    /// Connects to a server that must be there.
    pub(crate) fn connect(data: &Path) -> Result<Self, String> {
        Self::find(data)?.ok_or_else(|| {
            format!(
                "no server runs on {}; start one with `heeler serve --data {}`, or name the data \
                 directory of the one that runs with --data",
                data.display(),
                data.display()
            )
        })
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, String> {
        self.ask_with(request, &mut |_, _| {})
    }

    /// The same, with news of how far it got: (bytes done, bytes in all).
    pub(crate) fn ask_with<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<T, String> {
        let lost = |e: io::Error| format!("the connection to the server broke: {e}");
        let mut line = serde_json::to_vec(request).expect("requests are plain data");
        line.push(b'\n');
        self.stream.write_all(&line).map_err(lost)?;
        for line in BufReader::new(&self.stream).lines() {
            match serde_json::from_str(&line.map_err(lost)?).map_err(strange)? {
                Answer::Progress { done_bytes, total_bytes } => progress(done_bytes, total_bytes),
                Answer::Done(value) => return serde_json::from_value(value).map_err(strange),
                Answer::Failed(text) => return Err(text),
            }
        }
        Err("the server ended before it answered; its log says why".into())
    }
}

fn gone(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn strange(e: serde_json::Error) -> String {
    format!("the server speaks another language ({e}); is it another version of heeler?")
}

/// A progress bar of bytes on a terminal; nothing elsewhere.
#[derive(Debug)]
pub(crate) struct Bar(Option<indicatif::ProgressBar>);

impl Bar {
    /// A bar with a label.
    pub(crate) fn new(label: &'static str) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let style = indicatif::ProgressStyle::with_template(
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        let bar = indicatif::ProgressBar::new(0).with_message(label);
        Self(Some(bar.with_style(style.expect("the template is sound"))))
    }

    /// So many bytes of so many are done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
