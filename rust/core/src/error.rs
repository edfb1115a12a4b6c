//! Every way the core can fail.
//!
//! A message says what is wrong with the value, the bound, and the way out, in that order.

use std::path::PathBuf;

/// What an operation of the core gives.
pub type Result<T> = std::result::Result<T, Error>;

/// The error of an [`Encoder`](crate::tokenize::Encoder), which does not know where its text came from.
pub type EncoderError = Box<dyn std::error::Error + Send + Sync>;

/// Every way the core can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system does not give us the tokenizer file.
    #[error("cannot read the tokenizer file {}: {source}", path.display())]
    TokenizerUnreadable {
        /// The file that was asked for.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// The tokenizer file is not JSON, or describes a tokenizer that cannot be built.
    #[error(
        "not a usable tokenizer: {reason} (expected a `tokenizer.json` as `save_pretrained` of transformers writes it)"
    )]
    TokenizerNotUnderstood {
        /// What the reader of the file objects to.
        reason: String,
    },

    /// The tokenizer refuses a text, for example one without an unknown token to fall back to.
    #[error("text {text_index} cannot be encoded: {source}")]
    Encode {
        /// Position of the text in its batch.
        text_index: usize,
        /// What the tokenizer said.
        source: EncoderError,
    },

    /// The tokenizer refuses a sequence of ids which are all in its vocabulary.
    #[error("sequence {sequence_index} cannot be decoded: {source}")]
    Decode {
        /// Position of the sequence in its batch.
        sequence_index: usize,
        /// What the tokenizer said.
        source: EncoderError,
    },

    /// An id below 0.
    #[error(
        "ids must be at least 0, got {id} at position {position} (drop padding before decoding)"
    )]
    IdNegative {
        /// The id.
        id: i32,
        /// Where it stands in the packed ids.
        position: usize,
    },

    /// Offsets without even the first boundary.
    #[error("offsets must hold at least the 0 in front of the first sequence, got none")]
    OffsetsEmpty,

    /// Offsets that do not cut the ids into consecutive sequences.
    #[error(
        "offsets[{position}] is {offset}, but offsets must start at 0, never fall and end at the number of ids, {num_ids}"
    )]
    OffsetsMalformed {
        /// Which boundary is wrong.
        position: usize,
        /// Its value.
        offset: i64,
        /// Number of ids to cut.
        num_ids: usize,
    },

    /// A micro-batch that could hold no token.
    #[error(
        "token_budget must be at least 1, got {token_budget} (set it to what one forward pass can hold)"
    )]
    TokenBudgetTooSmall {
        /// The budget that was asked for.
        token_budget: i64,
    },

    /// The environment asks for a number of threads which is none.
    #[error(
        "{variable} must be a whole number of at least 1, got {value:?} (unset it to use every core)"
    )]
    NumThreadsInvalid {
        /// Name of the environment variable.
        variable: &'static str,
        /// What it is set to.
        value: String,
    },

    /// A count or limit below what makes sense.
    #[error("{name} must be at least {minimum}, got {value}")]
    TooSmall {
        /// The argument.
        name: &'static str,
        /// What came.
        value: i64,
        /// The bound.
        minimum: i64,
    },

    /// An id or a length below 0.
    #[error("{name}[{index}] must be at least 0, got {value}")]
    Negative {
        /// The column.
        name: &'static str,
        /// Where it stands.
        index: usize,
        /// What came.
        value: i64,
    },

    /// A number that is infinite or none at all.
    #[error("{name}[{index}] must be finite, got {value} (has the training diverged?)")]
    NotFinite {
        /// The column.
        name: &'static str,
        /// Where it stands.
        index: usize,
        /// What came.
        value: f64,
    },

    /// A real number outside its bounds.
    #[error("{name} must be {allowed}, got {value}")]
    SettingOutOfRange {
        /// The argument.
        name: &'static str,
        /// What came.
        value: f64,
        /// The bounds, in words.
        allowed: &'static str,
    },

    /// A column that does not go with the others.
    #[error("{name} must have one entry for each {thing}, {expected}, got {length}")]
    LengthDiffers {
        /// The column.
        name: String,
        /// Its length.
        length: usize,
        /// The length it should have.
        expected: usize,
        /// What an entry stands for.
        thing: &'static str,
    },

    /// A position where nothing is.
    #[error("{name}[{position}] must be at least 0 and below {count}, got {value}")]
    IndexOutOfRange {
        /// The column of indices.
        name: &'static str,
        /// Where it stands.
        position: usize,
        /// What came.
        value: i64,
        /// Number of things to choose from.
        count: usize,
    },

    /// A sequence without any token.
    #[error("{name} must hold at least one id, got none")]
    IdsEmpty {
        /// The argument.
        name: &'static str,
    },

    /// A finish reason that none of the constants stands for.
    #[error("finish_reason must be 0 (stop) or 1 (length), got {code}")]
    FinishReasonUnknown {
        /// What came.
        code: i64,
    },

    /// A stream which the buffer was not made for.
    #[error("unknown stream {name:?} (the buffer was made with streams {known:?})")]
    StreamUnknown {
        /// The stream that came.
        name: String,
        /// Those of the buffer.
        known: Vec<String>,
    },

    /// A rollout without one of the streams of its buffer.
    #[error(
        "stream {name:?} is missing (a rollout has every stream that the buffer was made with)"
    )]
    StreamMissing {
        /// The stream that did not come.
        name: String,
    },

    /// Two streams of one name.
    #[error("streams must have different names, got {name:?} twice")]
    StreamRepeated {
        /// Their name.
        name: String,
    },

    /// More rollouts than a group has.
    #[error(
        "group_id {group_id} already has its {group_size} rollouts (its number is free again once the group is taken)"
    )]
    GroupFull {
        /// The group.
        group_id: i64,
        /// Rollouts a group.
        group_size: usize,
    },

    /// A rollout of another prompt than the rest of its group.
    #[error("prompt_ids differ from those of the other rollouts of group_id {group_id}")]
    PromptDiffers {
        /// The group.
        group_id: i64,
    },

    /// A second teacher response to one prompt.
    #[error("group_id {group_id} already has its teacher response")]
    TeacherRepeated {
        /// The group.
        group_id: i64,
    },

    /// A rollout for a buffer which takes none any more.
    #[error("the rollout buffer is closed (push before close())")]
    BufferClosed,

    /// Advantages of a batch that nothing has judged yet.
    #[error("the batch has no rewards (take those of with_scores())")]
    RewardsMissing,

    /// A forward pass beyond what attention kernels can index.
    #[error(
        "{num_tokens} tokens do not fit one forward pass, at most {} do (lower the token budget)",
        i32::MAX
    )]
    TooManyTokens {
        /// Tokens that were asked for.
        num_tokens: u64,
    },

    /// Offsets of another number of groups.
    #[error("group_offsets must have one entry more than the {num_groups} groups, got {length}")]
    GroupOffsetsCount {
        /// Number of offsets.
        length: usize,
        /// Number of groups.
        num_groups: usize,
    },

    /// Offsets that do not cut what they belong to into consecutive parts.
    #[error(
        "{name}[{position}] is {offset}, but {name} must start at 0, never fall and end at the number of {things}, {count}"
    )]
    BoundariesMalformed {
        /// The argument.
        name: &'static str,
        /// Which boundary is wrong.
        position: usize,
        /// Its value.
        offset: i64,
        /// What is cut.
        things: &'static str,
        /// Number of things to cut.
        count: usize,
    },

    /// A size to balance which has no cost.
    #[error("costs_or_lengths[{index}] must be at least 0 and have a finite cost, got {size}")]
    SizeOutOfRange {
        /// Where it stands.
        index: usize,
        /// What came.
        size: f64,
    },

    /// More ranks than any cluster has.
    #[error("num_ranks must be at most {most}, got {num_ranks}")]
    TooManyRanks {
        /// What came.
        num_ranks: usize,
        /// The bound.
        most: i64,
    },

    /// A schedule that is nearly all padding, or too large for any run.
    #[error(
        "a schedule of {num_cells} micro-batches is too large (balance them over the ranks first)"
    )]
    ScheduleTooLarge {
        /// Micro-batches of all ranks, empty ones included.
        num_cells: usize,
    },

    /// A part of a cache's row that cannot be stored.
    #[error("{field} cannot be stored: {reason}")]
    CacheRequestInvalid {
        /// The part.
        field: &'static str,
        /// What is wrong with it, and what is allowed.
        reason: String,
    },

    /// The operating system or `SQLite` does not give us the file.
    #[error("cannot open the cache {}: {reason} (check that the path and its folder are yours)", path.display())]
    CacheUnopenable {
        /// The file that was asked for.
        path: PathBuf,
        /// What stands in the way.
        reason: String,
    },

    /// A file that is something else.
    #[error("{} is no teacher cache: {reason} (it was left as it is; name another path)", path.display())]
    CacheNotACache {
        /// The file that was asked for.
        path: PathBuf,
        /// What it is.
        reason: String,
    },

    /// A cache of a later release.
    #[error("the cache {} has format {found}, this version reads up to {known} (upgrade gad-fast)", path.display())]
    CacheFormatUnknown {
        /// The file that was asked for.
        path: PathBuf,
        /// Its format.
        found: i32,
        /// The newest that we know.
        known: i32,
    },

    /// A path that other machines may write to as well.
    #[error(
        "the cache {} is on {file_system}, where a write-ahead log can lose rows (keep the cache on a local disk, and share an export of it)",
        path.display()
    )]
    CacheOnNetwork {
        /// The file that was asked for.
        path: PathBuf,
        /// What it is on.
        file_system: &'static str,
    },

    /// Somebody else writes to the cache.
    #[error(
        "the cache {} is written to by {} (close it there, or open it to read only)",
        path.display(), name_writer(*process_id)
    )]
    CacheLocked {
        /// The file that was asked for.
        path: PathBuf,
        /// The process that opened it first, which may have handed it to one it forked.
        process_id: Option<u32>,
    },

    /// A row is not on disk, and will not be.
    #[error(
        "cannot write to the cache {}: {reason}; {free} (what was acknowledged is safe; make room and put again)",
        path.display()
    )]
    CacheNotWritten {
        /// The cache.
        path: PathBuf,
        /// What `SQLite` said.
        reason: String,
        /// The free space, in words.
        free: String,
    },

    /// The cache does not hold what was stored in it.
    #[error("the cache {} is damaged, {place}: {reason} (gad-fast cache verify lists all damage, export saves the rest)", path.display())]
    CacheCorrupt {
        /// The cache.
        path: PathBuf,
        /// Where in it.
        place: String,
        /// What is wrong.
        reason: String,
    },

    /// `SQLite` fails in a way that has no name here.
    #[error("the cache {} cannot be used: {reason}", path.display())]
    CacheEngine {
        /// The cache.
        path: PathBuf,
        /// What `SQLite` said.
        reason: String,
    },

    /// A row for a cache that was closed.
    #[error("the cache {} is closed (open it again to write)", path.display())]
    CacheClosed {
        /// The cache.
        path: PathBuf,
    },

    /// A row for a cache that was opened to read.
    #[error("the cache {} was opened to read only (open it without read_only to write)", path.display())]
    CacheReadOnly {
        /// The cache.
        path: PathBuf,
    },

    /// A row for a cache that another process opened.
    #[error(
        "the cache {} was opened by process {opened_by}, and a forked process cannot write to it (write in the parent; reading works)",
        path.display()
    )]
    CacheForked {
        /// The cache.
        path: PathBuf,
        /// The process that may write.
        opened_by: u32,
    },

    /// A stop string that every text holds.
    #[error("stop strings must not be empty, got an empty one at {stop_index} (leave it out)")]
    StopEmpty {
        /// Where it stands among the stop strings.
        stop_index: usize,
    },

    /// Bytes that are to be a text and are none.
    #[error(
        "text {text_index} is no UTF-8 from its byte {position} on (read the column as text, or decode its bytes first)"
    )]
    TextNotUtf8 {
        /// Position of the text in its batch.
        text_index: usize,
        /// Number of bytes in front that are UTF-8.
        position: usize,
    },

    /// The caller said that the work should not go on.
    #[error("interrupted, the batch is not complete (call again)")]
    Interrupted,
}

fn name_writer(process_id: Option<u32>) -> String {
    match process_id {
        Some(process_id) => format!("process {process_id}"),
        None => "another process".to_owned(),
    }
}
