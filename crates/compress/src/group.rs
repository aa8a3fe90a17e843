//! Which of a layer's replaced experts share a base (LightMoE section 3.2).

use crate::select::ascending;

/// The experts of one shared base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The member with the highest score.
    pub dominant: usize,
    /// All members by descending score, so the dominant first; two or more.
    pub members: Vec<usize>,
}

/// The selected experts of one layer, to be grouped.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'a> {
    /// The experts to be replaced, in any order.
    pub selected: &'a [usize],
    /// `[E]` scores of all experts of the layer.
    pub scores: &'a [f64],
    /// `[E * E]` row-major similarities of the experts' router logits.
    pub similarity: Option<&'a [f64]>,
}

impl Selected<'_> {
    /// Forms at most `count` groups.
    ///
    /// The `count` selected experts of highest score are the dominants. Every other selected
    /// expert joins the dominant it is most similar to (of equals, the one of higher score).
    /// Without similarities the others are dealt out in descending order of score, one to each
    /// dominant in turn.
    ///
    /// Groups come by descending score of their dominants. A dominant that nobody joins would
    /// cost a base *and* an adapter, more than the expert itself: it forms no group and stays as
    /// it is. With `count` or fewer selected experts there is nothing to gain, and no group.
    pub fn groups(&self, count: usize) -> Vec<Group> {
        if self.selected.len() <= count || count == 0 {
            return Vec::new();
        }
        let mut order = self.selected.to_vec();
        order.sort_by(|&a, &b| self.scores[b].total_cmp(&self.scores[a]).then(a.cmp(&b)));
        let (dominants, others) = order.split_at(count);
        let mut groups: Vec<Group> = dominants
            .iter()
            .map(|&dominant| Group {
                dominant,
                members: vec![dominant],
            })
            .collect();
        for (turn, &expert) in others.iter().enumerate() {
            let group = match self.similarity {
                Some(similarity) => self.closest(similarity, expert, dominants),
                None => turn % count,
            };
            groups[group].members.push(expert);
        }
        groups.retain(|group| group.members.len() > 1);
        groups
    }

    /// The position in `dominants` of the one most similar to `expert`, the first of equals.
    fn closest(&self, similarity: &[f64], expert: usize, dominants: &[usize]) -> usize {
        let row = &similarity[expert * self.scores.len()..][..self.scores.len()];
        let values: Vec<f64> = dominants.iter().map(|&dominant| -row[dominant]).collect();
        ascending(&values).first().copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(dominant: usize, members: &[usize]) -> Group {
        Group {
            dominant,
            members: members.to_vec(),
        }
    }

    fn similar(experts: usize, pairs: &[(usize, usize, f64)]) -> Vec<f64> {
        let mut all = vec![0.0; experts * experts];
        for &(a, b, value) in pairs {
            all[a * experts + b] = value;
            all[b * experts + a] = value;
        }
        all
    }

    const SCORES: [f64; 7] = [0.05, 0.10, 0.40, 0.08, 0.02, 0.30, 0.05];
    const SELECTED: [usize; 5] = [4, 0, 6, 3, 1];

    #[test]
    fn members_join_their_most_similar_dominant() {
        let similarity = similar(7, &[(4, 1, 0.3), (4, 3, 0.9), (0, 1, 0.1), (6, 3, -0.5)]);
        let selection = Selected {
            selected: &SELECTED,
            scores: &SCORES,
            similarity: Some(&similarity),
        };
        // Dominants 1 and 3: not 2 and 5, which are kept. 6 prefers 1 (0) to 3 (-0.5).
        let expected = [group(1, &[1, 0, 6]), group(3, &[3, 4])];
        assert_eq!(selection.groups(2), expected);
    }

    #[test]
    fn without_similarities_the_others_are_dealt_out() {
        let selection = Selected {
            selected: &SELECTED,
            scores: &SCORES,
            similarity: None,
        };
        let expected = [group(1, &[1, 0, 4]), group(3, &[3, 6])];
        assert_eq!(selection.groups(2), expected);
    }

    #[test]
    fn a_dominant_alone_forms_no_group() {
        let similarity = similar(7, &[(4, 1, 0.9), (0, 1, 0.9), (6, 1, 0.9)]);
        let selection = Selected {
            selected: &SELECTED,
            scores: &SCORES,
            similarity: Some(&similarity),
        };
        assert_eq!(selection.groups(2), [group(1, &[1, 0, 6, 4])]);
    }

    #[test]
    fn too_few_experts_form_no_group() {
        let selection = Selected {
            selected: &SELECTED,
            scores: &SCORES,
            similarity: None,
        };
        assert!(selection.groups(5).is_empty());
        assert!(selection.groups(6).is_empty());
        assert_eq!(selection.groups(4).len(), 1);
    }
}
