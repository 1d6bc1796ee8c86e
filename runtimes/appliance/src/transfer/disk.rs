//! Either end of a transfer, as a disk.

use std::sync::Arc;

use bytes::Bytes;

use super::extents::{Extent, Extents};
use super::image::Image;
use super::nbd::Client;

/// An image file, or an export of an NBD server.
#[derive(Debug)]
pub(crate) enum Disk {
    /// A file.
    Image(Arc<Image>),
    /// An export.
    Nbd(Client),
}

impl Disk {
    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Image(image) => image.size(),
            Self::Nbd(client) => client.size(),
        }
    }

    /// Where there is data.
    pub(crate) async fn extents(&self) -> Result<Extents, String> {
        match self {
            Self::Image(image) => blocking(image, |image| image.extents()).await,
            Self::Nbd(client) => client.extents().await,
        }
    }

    /// Reads bytes; zeroes, where the disk has ended.
    pub(crate) async fn read(&self, extent: Extent) -> Result<Bytes, String> {
        let there = extent.len.min(self.size().saturating_sub(extent.at)) as usize;
        let mut data = match self {
            _ if there == 0 => Vec::new(),
            Self::Image(image) => {
                blocking(image, move |image| image.read(extent.at, there)).await?
            }
            Self::Nbd(client) => client.read(extent.at, there).await?,
        };
        data.resize(extent.len as usize, 0);
        Ok(data.into())
    }

    /// Writes bytes.
    pub(crate) async fn write(&self, at: u64, data: Bytes) -> Result<(), String> {
        match self {
            Self::Image(image) => blocking(image, move |image| image.write(at, &data)).await,
            Self::Nbd(client) => client.write(at, data).await,
        }
    }

    /// Makes bytes read as zeroes. Images are made of zeroes and need it nowhere.
    pub(crate) async fn zero(&self, extent: Extent) -> Result<(), String> {
        match self {
            Self::Image(_) => Ok(()),
            Self::Nbd(client) => client.zero(extent.at, extent.len).await,
        }
    }

    /// Makes all that was written durable.
    pub(crate) async fn flush(&self) -> Result<(), String> {
        match self {
            Self::Image(image) => blocking(image, Image::flush).await,
            Self::Nbd(client) => client.flush().await,
        }
    }
}

async fn blocking<T: Send + 'static>(
    image: &Arc<Image>,
    work: impl FnOnce(&Image) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let image = image.clone();
    let done = tokio::task::spawn_blocking(move || work(&image)).await;
    done.map_err(|e| format!("a thread for files: {e}"))?
}
