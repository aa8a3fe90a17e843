//! Which prompts have their answers generated together.

/// Prompts of a queue for each that it works on at a time. The last of a queue leave its places empty,
/// so longer queues take less time; and where two queues are worked off side by side, the end of the last one
/// leaves a core without work.
const ROUNDS: usize = 4;

/// Prompts that are worked off together: where the answer to one ends, the next takes its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queue {
    /// Their numbers, longest first.
    pub(crate) prompts: Vec<usize>,
    /// How many at a time.
    pub(crate) at_once: usize,
}

/// Prompts of the same kind, which stand longest first, in queues: a function of all of them. With answers
/// of `most` tokens, a queue holds at most `batch_tokens` tokens at a time, or one prompt. There are
/// two queues wherever there is work for two, to be done side by side.
pub(crate) fn queues(
    prompts: &[usize],
    length: impl Fn(usize) -> usize,
    most: usize,
    batch_tokens: usize,
) -> Vec<Queue> {
    let at_once = |prompts: &[usize]| {
        let longest = prompts.first().map_or(0, |&prompt| length(prompt));
        (batch_tokens / (longest + most).max(1)).max(1)
    };
    let width = at_once(prompts);
    let batches = prompts.len().div_ceil(width);
    let count = batches.div_ceil(ROUNDS).max(batches.min(2)).max(1);
    let size = prompts.len().div_ceil(count).max(1);
    let queue = |prompts: &[usize]| Queue {
        prompts: prompts.to_vec(),
        at_once: at_once(prompts),
    };
    prompts.chunks(size).map(queue).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_hold_every_prompt_once_and_keep_to_their_size() {
        for (count, longest) in [(0, 1), (1, 9), (7, 20), (100, 30), (1000, 300)] {
            let length = |prompt: usize| 1 + (count - prompt) * longest / (count + 1);
            let prompts: Vec<usize> = (0..count).collect();
            for limit in [1, 100, 1000, 1_000_000] {
                let all = queues(&prompts, length, 10, limit);
                let joined: Vec<usize> = all.iter().flat_map(|q| q.prompts.clone()).collect();
                assert_eq!(joined, prompts);
                for queue in &all {
                    let tokens = queue.at_once * (length(queue.prompts[0]) + 10);
                    assert!(tokens <= limit || queue.at_once == 1, "{tokens} in {limit}");
                    assert!(queue.prompts.len() <= ROUNDS * queue.at_once);
                }
            }
        }
    }

    #[test]
    fn what_is_enough_for_two_is_divided() {
        let prompts: Vec<usize> = (0..60).collect();
        let counts = |batch_tokens| -> Vec<(usize, usize)> {
            let all = queues(&prompts, |_| 90, 10, batch_tokens);
            all.iter().map(|q| (q.prompts.len(), q.at_once)).collect()
        };
        assert_eq!(counts(6000), [(60, 60)]);
        assert_eq!(counts(5900), [(30, 59), (30, 59)]);
        assert_eq!(counts(800), [(30, 8), (30, 8)]);
        assert_eq!(counts(500), [(20, 5), (20, 5), (20, 5)]);
    }
}
