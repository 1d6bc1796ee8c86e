//! `heeler volume resize`, `rename` and `object`.

use heeler_store::{snapshots, volumes};

use super::{Target, print, run};
use crate::api::{ObjectMap, Order, Request};
use crate::cli::{ObjectArgs, RenameArgs, ResizeArgs};
use crate::client::Bar;
use crate::server::{resize_stored, unix_secs};
use crate::settings::Common;
use crate::{object, snapshot};

/// `heeler volume resize`.
pub(super) fn resize(common: Common<'_>, args: &ResizeArgs) -> Result<(), String> {
    let ResizeArgs { name, size, force, store } = args;
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            let bar = Bar::new("pushing");
            let order = Order::Resize { size_bytes: size.0, force: *force };
            let request = Request::VolumeManage { name: name.clone(), order };
            server.ask_with::<()>(&request, &mut |done, total| bar.set(done, total))?;
        }
        Target::Store(store) => run(resize_stored(&store, name, size.0))??,
    }
    println!("volume {name} has {size}; clients see it when they connect again");
    Ok(())
}

/// `heeler volume rename`.
pub(super) fn rename(common: Common<'_>, args: &RenameArgs) -> Result<(), String> {
    let RenameArgs { old, new, store } = args;
    match Target::find(common, store, false)? {
        Target::Server(mut server) => {
            let order = Order::Rename { to: new.clone() };
            server.ask::<()>(&Request::VolumeManage { name: old.clone(), order })?;
        }
        Target::Store(store) => {
            let now = unix_secs();
            let edit = async |edit| snapshots::edit(&store, old, now, &edit).await;
            let renamed = run(volumes::rename(&store, old, new, edit))?;
            renamed.map_err(snapshot::explain)?;
        }
    }
    println!("volume {old} is called {new} now");
    Ok(())
}

/// `heeler volume object`.
pub(super) fn object(common: Common<'_>, args: &ObjectArgs) -> Result<(), String> {
    let map: ObjectMap = match Target::find(common, &args.store, false)? {
        Target::Server(mut server) => {
            let order = Order::Object { object: args.object };
            server.ask(&Request::VolumeManage { name: args.name.clone(), order })?
        }
        Target::Store(store) => run(object::find(&store, &args.name, args.object))??,
    };
    print(args.json, &map, object::show);
    Ok(())
}
