//! Cache files and packs that are not what they should be: a clear error or the right data.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use heeler_core::ids::BLOCK_BYTES;
use heeler_core::wire::superblock::{
    CACHE_VERSION, REGIONS_PAGE, SUPERBLOCK_PAGES, Superblock, TABLE_PAGES,
};
use heeler_hw::crc32c;

use crate::clients::qemu_io;
use crate::rig::{Random, Scratch, Site, assert_begins, listing, python, run, said};
use crate::s3::{Moto, Wire};

/// A site whose cache holds a pushed image.
fn filled(scratch: &Scratch) -> (Site, String) {
    let site = Site::new(scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 24 << 20, 40);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    server.stop();
    (site, image)
}

/// The server does not start, says why, and leaves the file as it was.
fn refused(site: &Site, why: &str) {
    let before = fs::read(site.cache()).expect("the cache file");
    let mut server = site.spawn(&[]);
    assert_eq!(server.ended().code(), Some(1), "{}", server.log());
    let log = server.log();
    assert!(log.contains(why), "'{why}' is not in:\n{log}");
    assert!(log.contains("cache.img"), "the file is not named:\n{log}");
    assert!(!log.contains("panicked"), "{log}");
    assert!(fs::read(site.cache()).expect("the cache file") == before, "it was changed");
}

fn page(path: &Path, number: u32) -> Vec<u8> {
    let mut page = vec![0; BLOCK_BYTES];
    let file = File::open(path).expect("the cache file");
    file.read_exact_at(&mut page, u64::from(number) * BLOCK_BYTES as u64).expect("a page");
    page
}

fn put(path: &Path, number: u64, page: &[u8]) {
    let file = File::options().write(true).open(path).expect("the cache file");
    file.write_all_at(page, number * BLOCK_BYTES as u64).expect("a page");
}

#[test]
fn a_foreign_file_is_left_alone() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    fs::create_dir_all(&site.data).expect("the data directory");
    fs::write(site.cache(), Random(41).bytes(64 << 20)).expect("a file");
    refused(&site, "not a heeler cache");
}

#[test]
fn another_format_version_is_refused() {
    let scratch = Scratch::new();
    let (site, _) = filled(&scratch);
    for copy in SUPERBLOCK_PAGES {
        let mut page = page(&site.cache(), copy);
        page[8..12].copy_from_slice(&(CACHE_VERSION + 1).to_le_bytes());
        page[12..16].fill(0);
        let crc = crc32c(0, &page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        put(&site.cache(), copy.into(), &page);
    }
    refused(&site, &format!("version {}", CACHE_VERSION + 1));
}

#[test]
fn a_truncated_cache_is_refused() {
    let scratch = Scratch::new();
    let (site, _) = filled(&scratch);
    let file = File::options().write(true).open(site.cache()).expect("the cache file");
    file.set_len(40 << 20).expect("cut");
    refused(&site, "cut");
    file.set_len(100).expect("cut");
    refused(&site, "cache");
}

#[test]
fn lost_copies_of_the_first_pages_are_survived_or_reported() {
    let scratch = Scratch::new();
    let (site, image) = filled(&scratch);
    let garbage = Random(42).bytes(BLOCK_BYTES as u64);
    put(&site.cache(), SUPERBLOCK_PAGES[0].into(), &garbage);
    let server = site.serve(&[]);
    assert_begins(&server.uri("disk0"), &image);
    server.stop();
    for table in TABLE_PAGES {
        put(&site.cache(), table.into(), &garbage);
    }
    refused(&site, "volume table");
}

#[test]
fn a_scribbled_clean_cache_is_refetched() {
    let scratch = Scratch::new();
    let (site, image) = filled(&scratch);
    let superblock = Superblock::decode(&page(&site.cache(), SUPERBLOCK_PAGES[1]), crc32c);
    let superblock = superblock.expect("the superblock");
    let pages = superblock.device_bytes() / BLOCK_BYTES as u64;
    let mut random = Random(43);
    for round in 0..3 {
        // Every second page on average: headers, footers and data alike.
        for number in u64::from(REGIONS_PAGE)..pages {
            if random.next().is_multiple_of(2) {
                put(&site.cache(), number, &random.bytes(BLOCK_BYTES as u64));
            }
        }
        let server = site.serve(&[]);
        assert_begins(&server.uri("disk0"), &image);
        if round == 1 {
            run("nbdcopy", &[&image, &server.uri("disk0")]);
        }
        server.stop();
    }
}

#[test]
fn a_scrub_finds_what_is_damaged_and_fetches_it_again() {
    let scratch = Scratch::new();
    let site = Site::new(&scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 24 << 20, 45);
    let server = site.serve(&[]);
    run("nbdcopy", &[&image, &server.uri("disk0")]);
    site.run(&["cache", "flush"]);
    let sound = site.run(&["volume", "scrub", "disk0"]);
    assert!(sound.contains("checked 24 MiB of disk0: 0 blocks damaged, 0 repaired"), "{sound}");
    // Two blocks, one from the begin and one from the end: not both of them are in RAM.
    let wanted = fs::read(&image).expect("the image");
    let cache = fs::read(site.cache()).expect("the cache file");
    for block in [&wanted[..BLOCK_BYTES], &wanted[wanted.len() - BLOCK_BYTES..]] {
        let at = cache.chunks(BLOCK_BYTES).position(|page| page == block);
        put(&site.cache(), at.expect("it is cached") as u64, &Random(44).bytes(BLOCK_BYTES as u64));
    }
    File::open(site.cache()).expect("the cache file").sync_all().expect("on the device");
    let found = site.run(&["volume", "scrub", "disk0"]);
    assert!(found.contains("2 blocks damaged, 2 repaired"), "{found}");
    let sound = site.run(&["volume", "scrub", "disk0"]);
    assert!(sound.contains("0 blocks damaged"), "{sound}");
    assert_begins(&server.uri("disk0"), &image);
    assert_eq!(site.output(&["volume", "scrub", "nobody"]).status.code(), Some(1));
    server.stop();
}

#[test]
fn dirty_data_that_was_scribbled_is_an_error_never_other_data() {
    let scratch = Scratch::new();
    let moto = Moto::start(&scratch);
    let wire = Wire::to(&moto);
    let site = moto.site_by(&wire, &scratch);
    site.make_volume("disk0");
    let image = scratch.dense("image", 24 << 20, 46);
    // Without the store all of it stays dirty, and one shard has half of it.
    let size = ["--cache-size", "192M"];
    let server = site.serve(&size);
    wire.cut();
    run("nbdcopy", &["--flush", &image, &server.uri("disk0")]);
    // Records that come after a flush say so: what is before them cannot be a torn write. One for
    // each of 64 objects reaches every shard.
    let later: Vec<_> = (0..64).map(|i| format!("write -P 1 {}M 4k", 512 + 4 * i)).collect();
    qemu_io(&server, "disk0", &later.iter().map(String::as_str).collect::<Vec<_>>());
    server.kill();
    let pages = fs::metadata(site.cache()).expect("the cache file").len() / BLOCK_BYTES as u64;
    let mut random = Random(47);
    // Damaged headers of records are another matter: then the server does not start.
    let is_header = |number: u64| {
        let mut magic = [0; 8];
        let file = File::open(site.cache()).expect("the cache file");
        file.read_exact_at(&mut magic, number * BLOCK_BYTES as u64).expect("a page");
        magic == *b"HEELREC1"
    };
    for number in (u64::from(REGIONS_PAGE)..pages).step_by(41).filter(|number| !is_header(*number))
    {
        put(&site.cache(), number, &random.bytes(BLOCK_BYTES as u64));
    }
    wire.mend();
    let server = site.serve(&size);
    python("begins.py", &[&server.uri("disk0"), &image, "failures"]);
    drop(server);
}

#[test]
fn data_scribbled_while_serving_is_refetched() {
    let scratch = Scratch::new();
    let (site, image) = filled(&scratch);
    let server = site.serve(&[]);
    let pages = fs::metadata(site.cache()).expect("the cache file").len() / BLOCK_BYTES as u64;
    let mut random = Random(44);
    for number in u64::from(REGIONS_PAGE)..pages {
        put(&site.cache(), number, &random.bytes(BLOCK_BYTES as u64));
    }
    assert_begins(&server.uri("disk0"), &image);
    drop(server);
}

#[test]
fn a_check_finds_damage() {
    let scratch = Scratch::new();
    let (site, _) = filled(&scratch);
    let sound = site.output_on_store(&["check", "--deep"]);
    assert!(sound.status.success(), "{}", said(&sound));
    let packs: Vec<_> = listing(&site.store_dir())
        .into_keys()
        .filter(|path| path.components().any(|part| part.as_os_str() == "pack"))
        .collect();
    let (pack, other) = (&packs[0], packs.last().expect("several packs"));
    assert_ne!(pack, other, "one pack only");
    let whole = fs::read(pack).expect("a pack");
    let mut bytes = whole.clone();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(pack, &bytes).expect("a damaged pack");
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    let damaged = site.output_on_store(&["check", "--deep"]);
    assert_eq!(damaged.status.code(), Some(1), "{}", said(&damaged));
    fs::write(pack, &whole).expect("repaired");
    fs::remove_file(other).expect("a pack");
    let missing = site.output_on_store(&["check", "disk0"]);
    assert_eq!(missing.status.code(), Some(1), "{}", said(&missing));
    assert!(said(&missing).contains("missing"), "{} {}", name(other), said(&missing));
    // The volume of a name that does not exist.
    assert_eq!(site.output_on_store(&["check", "nobody"]).status.code(), Some(1));
}

#[test]
fn a_check_finds_damage_in_the_cache() {
    let scratch = Scratch::new();
    let (site, _) = filled(&scratch);
    let pages = fs::metadata(site.cache()).expect("the cache file").len() / BLOCK_BYTES as u64;
    let mut random = Random(45);
    for number in (u64::from(REGIONS_PAGE)..pages).step_by(3) {
        put(&site.cache(), number, &random.bytes(BLOCK_BYTES as u64));
    }
    let damaged = site.output_on_store(&["check"]);
    assert_eq!(damaged.status.code(), Some(1), "{}", said(&damaged));
}

#[test]
fn damaged_packs_are_an_error_never_data() {
    let scratch = Scratch::new();
    let (site, image) = filled(&scratch);
    fs::remove_file(site.cache()).expect("the cache file");
    for (path, _) in listing(&site.store_dir()) {
        if path.components().any(|part| part.as_os_str() == "pack") {
            let mut bytes = fs::read(&path).expect("a pack");
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x40;
            fs::write(&path, &bytes).expect("a damaged pack");
        }
    }
    let server = site.serve(&[]);
    python("begins.py", &[&server.uri("disk0"), &image, "failures"]);
    server.assert_alive();
    drop(server);
}
