//! `heeler volume resize`.

use super::{Target, run};
use crate::api::Request;
use crate::cli::ResizeArgs;
use crate::client::Bar;
use crate::server::resize_stored;
use crate::settings::Common;

/// `heeler volume resize`.
pub(super) fn resize(common: Common<'_>, args: &ResizeArgs) -> Result<(), String> {
    let ResizeArgs { name, size, force, store } = args;
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            let bar = Bar::new("pushing");
            let (name, size_bytes) = (name.clone(), size.0);
            let request = Request::VolumeResize { name, size_bytes, force: *force };
            server.ask_with::<()>(&request, &mut |done, total| bar.set(done, total))?;
        }
        Target::Store(store) => run(resize_stored(&store, name, size.0))??,
    }
    println!("volume {name} has {size}; clients see it when they connect again");
    Ok(())
}
