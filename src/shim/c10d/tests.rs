//! Stores, collectives and the reducer, over real sockets.

use tch::Tensor;

use super::*;

const FLOAT: (tch::Kind, tch::Device) = (tch::Kind::Float, tch::Device::Cpu);
/// Only who hangs takes so long.
const SOON: Duration = Duration::from_secs(300);

fn serve() -> Store {
    Store::open("127.0.0.1", 0, Role::Serve, "test", SOON).unwrap()
}

fn join(port: u16) -> Store {
    Store::open("127.0.0.1", port, Role::Join, "test", SOON).unwrap()
}

/// Runs `body` as each of `size` ranks, in threads with groups of their own.
fn ranks(size: usize, body: impl Fn(&Group) + Sync) {
    let server = serve();
    let port = server.port();
    std::thread::scope(|scope| {
        for rank in 0..size {
            let body = &body;
            scope.spawn(move || {
                let store = join(port);
                let member = Member { rank, size };
                body(&Group::gloo(&store, "127.0.0.1", member, SOON).unwrap());
            });
        }
    });
}

fn numbers(values: &[f32]) -> Tensor {
    Tensor::from_slice(values)
}

// One test, so that no other of this program holds handles meanwhile.
#[test]
fn collectives_do_what_they_say_and_every_handle_is_closed() {
    store_keeps_what_it_is_given();
    collectives();
    gradients_are_averaged();
    every_backward_pass_sums_in_the_same_order();
    a_barrier_names_who_is_missing();
    errors_are_words();
    assert_eq!(live_handles(), [0; 4], "stores, groups, works, reducers");
}

fn store_keeps_what_it_is_given() {
    let server = serve();
    let client = join(server.port());
    assert_eq!(client.get("a").unwrap(), None);
    let long: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
    for value in [&b""[..], b"x", &long] {
        server.set("a", value).unwrap();
        assert_eq!(client.another().unwrap().get("a").unwrap().unwrap(), value);
    }
    assert_eq!(client.add("n", 2).unwrap(), 2);
    assert_eq!(server.add("n", 3).unwrap(), 5);
}

fn collectives() {
    ranks(3, |group| {
        let rank = group.member.rank as f32;
        let mut sum = numbers(&[rank, 1.0]);
        group.sum(&mut sum).unwrap().wait().unwrap();
        assert_eq!(sum, numbers(&[3.0, 3.0]));

        let (mine, mut all) = (numbers(&[rank, -rank]), numbers(&[9.0; 6]));
        group.gather(&mine, &mut all).unwrap().wait().unwrap();
        assert_eq!(all, numbers(&[0.0, 0.0, 1.0, -1.0, 2.0, -2.0]));

        // Rank r sends row r of its three to rank 0, then its others to rank 2.
        let mine = numbers(&[rank, 10.0 + rank, 20.0 + rank]);
        let receive = [[1; 3], [0; 3], [2; 3]][group.member.rank];
        let mut into = numbers(&vec![9.0; 3 * receive[0] as usize]);
        group.exchange(&mine, &[1, 0, 2], &mut into, &receive).unwrap().wait().unwrap();
        let expected: &[f32] = match group.member.rank {
            0 => &[0.0, 1.0, 2.0],
            1 => &[],
            _ => &[10.0, 20.0, 11.0, 21.0, 12.0, 22.0],
        };
        assert_eq!(into, numbers(expected));

        let mut from_2 = numbers(&[rank]);
        group.broadcast(&mut from_2, 2).unwrap().wait().unwrap();
        assert_eq!(from_2, numbers(&[2.0]));
        // Dropped, not waited for: the drop waits.
        drop(group.sum(&mut from_2).unwrap());
        assert_eq!(from_2, numbers(&[6.0]));
        group.barrier(SOON).unwrap();
    });
}

fn gradients_are_averaged() {
    for (wire, tolerance) in [(Wire::Whole, 1e-6), (Wire::Bf16, 4e-3)] {
        ranks(2, |group| {
            let one = || numbers(&[0.5; 600]).set_requires_grad(true);
            let parameters = [one(), one()];
            let reducer = Reducer::new(group, &parameters, 2400, wire).unwrap();
            for round in 1..4 {
                let x = (3.0 * group.member.rank as f64 + 1.0) * f64::from(round); // 1, 4
                let loss = (&parameters[0] * x + &parameters[1] * 0.1).sum(None);
                // Of two micro-batches only the last is averaged, with what the first left.
                (&loss * 0.5).backward();
                let loss = (&parameters[0] * x + &parameters[1] * 0.1).sum(None);
                reducer.backward(&(loss * 0.5)).unwrap();
                for (parameter, mean) in parameters.iter().zip([2.5 * f64::from(round), 0.1]) {
                    let off = (parameter.grad() / mean - 1.0).abs().max();
                    assert!(off.double_value(&[]) <= tolerance, "{wire:?}: {off:?}");
                }
                parameters.iter().for_each(|p| p.shallow_clone().zero_grad());
            }
        });
    }
}

/// Of a new reducer the first pass has the bits of an old one's third. The gradients come in another order
/// than the parameters stand in, and fill several buckets.
fn every_backward_pass_sums_in_the_same_order() {
    for wire in [Wire::Whole, Wire::Bf16] {
        ranks(3, |group| {
            let leaf = |i: i64| (Tensor::arange(300, FLOAT) / (i + 7)).set_requires_grad(true);
            let parameters: Vec<Tensor> = (0..6).map(leaf).collect();
            let unused = leaf(9);
            let loss = || {
                let x = (group.member.rank as f64 + 1.0) / 7.0;
                let each = [3, 0, 5, 1, 4, 2].map(|i| (&parameters[i] * x).sin().sum(None));
                each.iter().fold(Tensor::from(0.0_f32), |sum, one| (sum + one) * 1.1)
            };
            let all: Vec<Tensor> =
                parameters.iter().chain([&unused]).map(Tensor::shallow_clone).collect();
            let found = taking_part(&loss(), &all).unwrap();
            assert_eq!(found, parameters, "in their order, without the one that is not used");
            let passes = |count: usize| -> Vec<Tensor> {
                let reducer = Reducer::new(group, &found, 2400, wire).unwrap();
                for _ in 0..count {
                    parameters.iter().for_each(|p| p.shallow_clone().zero_grad());
                    reducer.backward(&loss()).unwrap();
                }
                parameters.iter().map(|p| p.grad().copy()).collect()
            };
            let third = passes(3);
            assert_eq!(passes(1), third, "{wire:?}");
        });
    }
}

fn a_barrier_names_who_is_missing() {
    let together = std::sync::Barrier::new(2);
    ranks(2, |group| {
        if group.member.rank == 0 {
            let error = group.barrier(Duration::from_millis(200)).unwrap_err().to_string();
            assert!(error.contains("Ranks 1 failed to pass"), "{error}");
        }
        together.wait(); // only then may rank 1 leave
    });
}

fn errors_are_words() {
    let short = Duration::from_millis(300);
    let store = serve();
    let missing = Member { rank: 0, size: 2 };
    let error = Group::gloo(&store, "127.0.0.1", missing, short).unwrap_err().to_string();
    assert!(error.contains("timeout") && !error.contains("Exception"), "{error}");
    let port = store.port();
    drop(store);
    let error = Store::open("127.0.0.1", port, Role::Join, "", short).unwrap_err().to_string();
    assert!(error.contains(&port.to_string()), "{error}");
    let found = crate::device::find(crate::config::Device::Auto).unwrap();
    if found.missing.is_some() {
        let store = serve();
        let error = Group::nccl(&store, 0, missing, short).unwrap_err().to_string();
        assert!(error.contains("no GPUs found") || error.contains("without NCCL"), "{error}");
    }
}
