//! Downloads that are cut short, answered wrongly or stopped.

use crate::server::{COMMIT, Fault};
use crate::world::{TIMEOUT, WEIGHTS, World, failed, mixtral, ranges, refused, says};
use lightmoe_models::hub::{HubName, Want, fetch};
use lightmoe_models::{Checkpoint, Error};
use std::fs;
use std::time::Instant;

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let world = World::new(mixtral());
    world
        .hub
        .fail(WEIGHTS, &[Fault::Breaks(1000), Fault::Breaks(500)]);
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    let (first, second) = (Some("bytes=1000-"), Some("bytes=1500-"));
    assert_eq!(ranges(&world.hub.seen()), [None, first, second]);
}

#[test]
fn a_later_call_goes_on_where_an_earlier_one_stopped() {
    let world = World::new(mixtral());
    let give_up = [
        Fault::Breaks(1000),
        Fault::Breaks(0),
        Fault::Breaks(0),
        Fault::Breaks(0),
    ];
    world.hub.fail(WEIGHTS, &give_up);
    failed(world.whole(), &["no answer", "network", "try again"]);
    assert!(world.partial().is_some());
    assert!(
        !world
            .names(&format!("snapshots/{COMMIT}"))
            .contains(&WEIGHTS.to_owned())
    );
    refused(world.offline().whole(), &["HF_HUB_OFFLINE"]);
    world.hub.seen();
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert_eq!(ranges(&world.hub.seen()), [Some("bytes=1000-")]);
    assert_eq!(world.partial(), None);
}

#[test]
fn a_truncated_answer_is_no_file() {
    let world = World::new(mixtral());
    world.hub.fail(WEIGHTS, &[Fault::Short(1000)]);
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert_eq!(ranges(&world.hub.seen()), [None, Some("bytes=1000-")]);

    let world = World::new(mixtral());
    world.hub.fail("config.json", &[Fault::Short(0); 3]);
    let size = mixtral()["config.json"].len().to_string();
    failed(
        world.whole(),
        &["0 bytes", "config.json", &size, "try again"],
    );
    assert!(world.names(&format!("snapshots/{COMMIT}")).is_empty());
}

#[test]
fn other_bytes_than_asked_for_are_not_taken() {
    for fault in [
        Fault::Whole,
        Fault::Elsewhere,
        Fault::Long,
        Fault::Status(503),
    ] {
        let world = World::new(mixtral());
        world.hub.fail(WEIGHTS, &[Fault::Breaks(1000), fault]);
        let folder = world.whole().unwrap();
        assert!(
            fs::read(folder.join(WEIGHTS)).unwrap() == mixtral()[WEIGHTS],
            "{fault:?}"
        );
    }
}

#[test]
fn a_server_that_never_keeps_its_word_is_given_up() {
    for fault in [Fault::Long, Fault::Elsewhere, Fault::Status(503)] {
        let world = World::new(mixtral());
        world.hub.fail(WEIGHTS, &[Fault::Breaks(1000)]);
        world.hub.fail(WEIGHTS, &[fault; 4]);
        failed(world.whole(), &["try again"]);
        assert!(
            !world
                .names(&format!("snapshots/{COMMIT}"))
                .contains(&WEIGHTS.to_owned())
        );
    }
}

#[test]
fn slow_is_not_silent() {
    let world = World::new(mixtral());
    world.hub.fail(WEIGHTS, &[Fault::Slow(TIMEOUT / 4)]);
    let begin = Instant::now();
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert!(begin.elapsed() > TIMEOUT * 2);
    assert_eq!(ranges(&world.hub.seen()), [None]);

    let world = World::new(mixtral());
    world.hub.fail(WEIGHTS, &[Fault::Silent; 3]);
    failed(world.whole(), &["silent for 0.4 s", "try again"]);
    world.whole().unwrap();
}

#[test]
fn a_user_may_stop_and_go_on() {
    let world = World::new(mixtral());
    let name = HubName::parse("org/tiny").unwrap();
    world.hub.fail(WEIGHTS, &[Fault::Slow(TIMEOUT / 10)]);
    let stopped = fetch(&name, Want::Whole, &world.options, &mut |file, done, _| {
        file != WEIGHTS || done == 0
    });
    let error = says(stopped, &["interrupted"]);
    assert!(matches!(error, Error::Interrupted), "{error:?}");
    world.hub.seen();
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert!(matches!(ranges(&world.hub.seen())[..], [Some(_)]));
}

#[test]
fn two_programs_share_a_download() {
    let world = World::new(mixtral());
    world.hub.fail(WEIGHTS, &[Fault::Slow(TIMEOUT / 10)]);
    std::thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| world.whole()));
        for one in both {
            Checkpoint::open(&one.join().unwrap().unwrap()).unwrap();
        }
    });
    assert_eq!(ranges(&world.hub.seen()), [None]);
}

/// A part that another program left in disorder is thrown away, and the file comes whole.
#[test]
fn a_part_with_other_content_is_not_trusted() {
    let world = World::new(mixtral());
    world.hub.fail(
        WEIGHTS,
        &[
            Fault::Breaks(1000),
            Fault::Breaks(0),
            Fault::Breaks(0),
            Fault::Breaks(0),
        ],
    );
    failed(world.whole(), &["try again"]);
    let blobs = world.cache.path().join("models--org--tiny/blobs");
    let part = blobs.join(world.partial().unwrap());
    let mut bytes = fs::read(&part).unwrap();
    bytes[500] ^= 1;
    fs::write(&part, bytes).unwrap();
    world.hub.seen();
    Checkpoint::open(&world.whole().unwrap()).unwrap();
    assert_eq!(ranges(&world.hub.seen()), [Some("bytes=1000-"), None]);
    assert_eq!(world.partial(), None);
}
