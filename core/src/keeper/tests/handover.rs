//! Detaching, and hearing of another owner.

use super::*;

#[test]
fn a_detach_can_be_called_off_until_the_release_is_on_its_way() {
    let (mut kept, mut late) = (0, 0);
    for steps in 0..150 {
        let mut world = World::new(6);
        let s = world.add();
        world.attach(s, false);
        world.write(s, 5, 1);
        world.feed(s, Input::Detach);
        (0..steps).for_each(|_| world.step());
        if world.servers[s].over {
            break;
        }
        world.feed(s, Input::Stay);
        if world.servers[s].keeper.phase() == Phase::Releasing {
            late += 1;
            world.run_until(|world| world.servers[s].released);
            assert_eq!(read_image(&world.objects).1[5], 1);
            continue;
        }
        kept += 1;
        world.write(s, 6, 2);
        world.push(s, 1);
        (0..500).for_each(|_| world.step());
        assert!(!world.newest().released && !world.servers[s].over);
        assert_eq!(read_image(&world.objects).1[5..7], [1, 2]);
        world.feed(s, Input::Detach);
        world.run_until(|world| world.servers[s].released);
    }
    assert!(kept > 0 && late > 0, "both ends were seen: {kept}, {late}");
}

/// Requests to the store for the head that would follow the server's newest.
fn probes(world: &World, s: usize) -> usize {
    let next = world.servers[s].keeper.status().head + 1;
    let key = names::head_key(VOLUME, next);
    let of = |pending: &&Pending| matches!(&pending.effect, Effect::Get(get, _) if *get == key);
    world.pending.iter().filter(|pending| pending.server == s).filter(of).count()
}

#[test]
fn an_owner_that_rested_hears_of_another_with_its_first_write() {
    let mut world = World::new(8);
    let (a, b) = (world.add(), world.add());
    world.attach(a, false);
    world.now = world.now + Duration::from_secs(60);
    world.attach(b, true);
    assert!(world.serves(a) && world.pending.is_empty(), "who rests asks nothing");
    let creates = world.servers[a].creates;
    let before = world.now;
    world.write(a, 9, 99);
    world.run_until(|world| world.servers[a].over);
    assert!(world.servers[a].fenced && world.servers[a].creates == creates);
    assert!(world.now - before < Duration::from_secs(5), "before it would have pushed");
}

#[test]
fn an_owner_asks_once_after_a_rest_and_goes_on() {
    let mut world = World::new(9);
    let s = world.add();
    world.attach(s, false);
    world.write(s, 9, 1);
    (0..50).for_each(|_| _ = world.step_mail(s, 0) || world.step_mail(s, 1));
    assert_eq!(probes(&world, s), 0, "it has just claimed the volume");
    world.push(s, 1);
    world.now = world.now + Duration::from_secs(60);
    world.write(s, 9, 2);
    let mail = (0..usize::from(SHARDS)).map(|i| world.step_mail(s, i));
    assert!(mail.collect::<Vec<_>>().contains(&true));
    assert_eq!(probes(&world, s), 1);
    world.faults = 100;
    (0..50).for_each(|_| _ = world.step_store());
    assert_eq!(probes(&world, s), 0, "a probe that fails is not tried again");
    world.faults = 0;
    world.push(s, 2);
    assert_eq!(read_image(&world.objects).1[9], 2);
}
