//! The runtimes that data cores can run on.

use clap::ValueEnum;
use heeler_driver::CoreLoop;
use heeler_driver::adapter::{Listener, RunError};
use heeler_hw::BlockQueue;
use serde::Deserialize;

/// What owns sockets, timers and sleep on the data cores.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Runtime {
    /// monoio: the leaner one.
    #[default]
    Monoio,
    /// glommio.
    Glommio,
}

impl Runtime {
    /// Its name, as it is given and shown.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Monoio => "monoio",
            Self::Glommio => "glommio",
        }
    }

    /// To be called before there are threads.
    pub(crate) fn prepare(self) {
        match self {
            Self::Monoio => {}
            Self::Glommio => heeler_glommio::prepare(),
        }
    }

    /// Runs a data core on the calling thread, bound to `cpu`, until the control thread says stop.
    ///
    /// # Errors
    ///
    /// [`RunError`].
    pub(crate) fn run_core<Q: BlockQueue + 'static, E>(
        self,
        cpu: u32,
        listeners: Vec<Listener>,
        build: impl FnOnce() -> Result<CoreLoop<'static, Q>, E>,
    ) -> Result<(), RunError<E>> {
        match self {
            Self::Monoio => heeler_monoio::run_core(Some(cpu), listeners, build),
            Self::Glommio => heeler_glommio::run_core(Some(cpu), listeners, build),
        }
    }
}
