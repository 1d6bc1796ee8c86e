//! Lists of snapshots, and the tree of volumes, snapshots and clones.

use heeler_core::wire::head::{Head, Source};
use heeler_store::volumes::{Listed, VolumeError};
use heeler_store::{Store, snapshots, volumes};

use crate::api::{SnapshotLine, TreeNode, TreeSnapshot};
use crate::lines::bytes;
use crate::server::unix_secs;
use crate::show;
use crate::size::Size;

/// What to say when a volume's snapshots could not be changed: only its owner can.
pub(crate) fn explain(error: VolumeError) -> String {
    match error {
        VolumeError::InUse { name, host, .. } => format!(
            "volume '{name}' belongs to a server on '{host}': do it there (name its data directory \
             with --data), or stop that server"
        ),
        e => e.to_string(),
    }
}

/// The snapshots of a volume, as the store knows them.
pub(crate) async fn list(store: &Store, volume: &str) -> Result<Vec<SnapshotLine>, VolumeError> {
    let head = volumes::named_head(store, volume).await?;
    let clones = snapshots::clones(store, head.volume, unix_secs()).await?;
    let line = |snapshot: &heeler_core::wire::head::Snapshot| {
        let own = clones.iter().filter(|clone| clone.number == snapshot.number);
        SnapshotLine {
            name: snapshot.name.clone(),
            size_bytes: bytes(snapshot.blocks),
            created_unix_secs: snapshot.created_unix_secs,
            head: snapshot.number,
            deleting: snapshot.deleting,
            served: false,
            clones: own.map(|clone| clone.name.clone()).collect(),
        }
    };
    Ok(head.snapshots.iter().map(line).collect())
}

/// The same, for people.
pub(crate) fn show_list(volume: &str, lines: &[SnapshotLine]) -> String {
    if lines.is_empty() {
        return format!("no snapshots; make one with `heeler snapshot create {volume}@NAME`\n");
    }
    let mut rows = vec![["NAME", "SIZE", "AGE", "STATE", "CLONES"].map(String::from)];
    for line in lines {
        let state = match (line.deleting, line.served) {
            (true, _) => "deleting",
            (false, true) => "served",
            (false, false) => "-",
        };
        let clones = match line.clones.len() {
            0 => "-".into(),
            1..=3 => line.clones.join(", "),
            more => more.to_string(),
        };
        rows.push([
            line.name.clone(),
            Size(line.size_bytes).to_string(),
            age(unix_secs().saturating_sub(line.created_unix_secs)),
            state.into(),
            clones,
        ]);
    }
    show::table(&rows)
}

/// The largest unit of which there are two.
fn age(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m")];
    let unit = units.into_iter().find(|(length, _)| seconds >= 2 * length);
    let (length, unit) = unit.unwrap_or((1, "s"));
    format!("{}{unit}", seconds / length)
}

/// All volumes, each clone below the snapshot that it was made from.
pub(crate) fn tree(listed: &[Listed]) -> Vec<TreeNode> {
    let heads: Vec<&Head> = listed.iter().filter_map(|volume| volume.head.as_ref().ok()).collect();
    let has = |source: &Source| {
        heads.iter().any(|head| {
            head.volume == source.volume && head.snapshots.iter().any(|s| s.number == source.number)
        })
    };
    let is_root = |head: &&&Head| head.sources.first().is_none_or(|parent| !has(parent));
    heads.iter().filter(is_root).map(|head| node(head, &heads)).collect()
}

fn node(head: &Head, heads: &[&Head]) -> TreeNode {
    let snapshots = head.snapshots.iter().map(|snapshot| {
        let itself = Source { volume: head.volume, number: snapshot.number };
        let clones = heads.iter().filter(|clone| clone.sources.first() == Some(&itself));
        TreeSnapshot {
            name: snapshot.name.clone(),
            clones: clones.map(|clone| node(clone, heads)).collect(),
        }
    });
    TreeNode {
        name: head.name.clone(),
        size_bytes: bytes(head.blocks),
        owner: (!head.released).then(|| head.host.clone()),
        snapshots: snapshots.collect(),
    }
}

/// The same, for people.
pub(crate) fn show_tree(tree: &[TreeNode]) -> String {
    let mut text = String::new();
    tree.iter().for_each(|node| draw(node, 0, &mut text));
    text
}

fn draw(node: &TreeNode, depth: usize, text: &mut String) {
    let owner = node.owner.as_ref().map_or_else(String::new, |owner| format!("  on {owner}"));
    let indent = "  ".repeat(depth);
    *text += &format!("{indent}{}  {}{owner}\n", node.name, Size(node.size_bytes));
    for snapshot in &node.snapshots {
        *text += &format!("{indent}  @{}\n", snapshot.name);
        snapshot.clones.iter().for_each(|clone| draw(clone, depth + 2, text));
    }
}

#[cfg(test)]
mod tests {
    use heeler_core::wire::head::Snapshot;
    use heeler_core::wire::names::Uuid;

    use super::*;

    fn listed(
        seed: u8,
        name: &str,
        parent: Option<(u8, u32)>,
        snapshots: &[(u32, &str)],
    ) -> Listed {
        let snapshot = |&(number, name): &(u32, &str)| Snapshot {
            name: name.into(),
            number,
            epoch: heeler_core::ids::Epoch::ZERO,
            blocks: 1 << 18,
            created_unix_secs: 1,
            deleting: false,
        };
        let source = |(seed, number)| Source { volume: Uuid([seed; 16]), number };
        let head = Head {
            sources: parent.map(source).into_iter().collect(),
            snapshots: snapshots.iter().map(snapshot).collect(),
            ..Head::first(Uuid([seed; 16]), name, 1 << 18, 22, 1)
        };
        Listed { name: name.into(), head: Ok(head) }
    }

    #[test]
    fn clones_stand_below_their_snapshots() {
        let all = [
            listed(3, "deep", Some((2, 7)), &[]),
            listed(1, "golden", None, &[(4, "v1"), (5, "v2")]),
            listed(9, "lost", Some((8, 1)), &[]),
            listed(2, "web", Some((1, 5)), &[(7, "base")]),
        ];
        assert_eq!(
            show_tree(&tree(&all)),
            "golden  1 GiB\n  @v1\n  @v2\n    web  1 GiB\n      @base\n        deep  1 GiB\n\
             lost  1 GiB\n"
        );
    }

    #[test]
    fn ages_have_one_unit() {
        let ages = [0, 119, 120, 7_199, 7_200, 172_800].map(age);
        assert_eq!(ages, ["0s", "119s", "2m", "119m", "2h", "2d"]);
    }
}
