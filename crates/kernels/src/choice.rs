//! How families choose experts by what their router says.

/// How a family turns router outputs into choices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Logistic scores, instead of the softmax.
    pub sigmoid: bool,
    /// The limit to some groups of experts, if the family has one.
    pub groups: Option<ExpertGroups>,
    /// Whether the gates of a token are divided by their sum.
    pub renormalize: bool,
    /// Factor of the gates.
    pub scaling: f32,
}

/// A limit of the choice to the best of equal groups of neighbouring experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// How many groups there are.
    pub count: usize,
    /// From how many of them experts can be chosen.
    pub kept: usize,
    /// Whether a group counts the sum of its two best scores, instead of the best.
    pub two_best: bool,
}
